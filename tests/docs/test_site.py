"""docs/ builds as a site without a warning: every link and anchor leads somewhere, every public name is in it."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import nvit

pytest.importorskip("mkdocstrings", reason="pip install 'nvit[docs]'")

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [found[k] for k in ("href", "src") if found.get(k)]
        self.ids.add(found.get("id"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT, env=os.environ | {"DISABLE_MKDOCS_2_WARNING": "true"}, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    return out


def test_every_link_leads_somewhere(site):
    pages = {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}
    bad, seen = [], 0
    for file, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:|//", link):
                continue
            path, _, anchor = unquote(link).partition("#")
            target = (file.parent / path).resolve() if path else file
            target = target / "index.html" if target.is_dir() else target
            seen += 1
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].ids):
                bad.append(f"{file.name}: {link}")
    assert seen > 500 and not bad, "\n".join(bad[:20])


def test_the_pages_are_there_with_what_they_link_to_outside(site):
    assert "Prune a timm model" in (site / "index.html").read_text(), "the README comes first"
    assert "class LatencyTable" in (site / "source" / "nvit" / "latency" / "table.py.txt").read_text()
    assert (site / "source" / "benchmarks" / "results" / "refit_cpu.png").stat().st_size > 10_000


def test_every_public_name_is_in_the_api(site):
    ids = Page(site / "api.html").ids
    homes = {name: f"nvit.{nvit._HOMES.get(name, '')}".rstrip(".") for name in nvit.__all__}
    names = {name: f"{home}.{name}" if home != "nvit" else f"nvit.{name}" for name, home in homes.items()}
    doors = {
        "nvit.snapshot.load": "nvit.structure.snapshot.load",
        "nvit.snapshot.BUNDLED": "nvit.structure.snapshot.BUNDLED",
    }
    doors |= {"nvit.adapters": "nvit.adapters.base.Adapter", "nvit.snapshot": "nvit.structure.snapshot"}
    missing = [name for name, path in names.items() if doors.get(path, path) not in ids]
    assert not missing, missing
