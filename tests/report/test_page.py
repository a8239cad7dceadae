"""What a page says of whole runs and of damaged ones, and that nothing in it is taken for markup."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

import nvit
from nvit.cli import main as cli
from nvit.report.page import build
from nvit.report.read import read
from nvit.utils.report import write_result

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=y> $x_{$ \\frac 日本 ü &amp; {{ 7 * 7 }}"


def text_of(folder, *more):
    assert cli.main(["report", str(folder), *more]) == 0
    return (folder / "report.html").read_text()


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the words between them."""

    def __init__(self, text):
        super().__init__()
        self.found, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_says_what_the_run_found(folder, capsys):
    text = text_of(folder)
    result = json.loads((folder / "result.json").read_text())
    for row in result["snapshots"]:
        assert f"pruned to {row['target']:g}" in text and f"{row['params'] / 1e6:.2f}" in text
    for title in ("What it costs and gives", "Widths that are left", "Predicted against measured", "How it went"):
        assert f"<h2>{title}</h2>" in text
    for word in ("fisher", "latency target", nvit.__version__, "torch", "0.9, 0.7, 0.6, 0.5"):
        assert word in text, word
    said = capsys.readouterr()
    beside = json.loads((folder / "report.html.json").read_text())
    assert said.out == f"{folder / 'report.html'}: {beside['runs'][0]['in_words']}\n" and "drawing" in said.err
    assert beside["runs"][0]["suggested"] in text and "What is not in this report" not in text


def test_every_figure_is_labelled_and_its_ids_are_its_own(folder):
    text = text_of(folder)
    svgs = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(svgs) == 8  # four figures, for a desk and for a phone
    ids = []
    for svg in svgs:
        root = ET.fromstring(svg)
        assert root.get("role") == "img" and len(root.get("aria-label")) > 40
        mine = [e.get("id") for e in root.iter() if e.get("id")]
        used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
        assert used <= set(mine)
        ids += mine
        assert "currentColor" in svg and not re.search("#333333|#0072b2", svg, re.I)
    assert len(ids) == len(set(ids))


def test_names_out_of_files_are_text(folder, capsys):
    file = folder / "result.json"
    raw = json.loads(file.read_text())
    raw["model"] = raw["recipe"]["data"] = raw["recipe"][EVIL] = raw["environment"]["device"] = raw["device"] = EVIL
    file.write_text(json.dumps(raw))
    evil = folder.parent / "<script>alert(2)<" / "script> $y ü"
    shutil.copytree(folder, evil)
    other = folder.parent / "compare"
    write_result(other, {"models": [{"name": EVIL, "measured_ratio": 1.0, "top1": 80.0}, {"name": f"2{EVIL}"}]})
    assert cli.main(["report", str(evil), str(folder), str(other), "--out", str(folder / "all.html")]) == 0
    text = (folder / "all.html").read_text()
    page = Tags(text)
    assert not {tag for tag, _ in page.found} & {"script", "img", "iframe", "object"}
    assert not [a for _, attrs in page.found for a in attrs if a.startswith("on")]
    words = " ".join("".join(page.words).split())
    assert words.count(EVIL) > 6 and "script> $y ü" in words
    links = [v for _, attrs in page.found for k, v in attrs.items() if k in ("src", "href") and not v.startswith("#")]
    assert links == ["data:,"] and "http" not in "".join(re.findall(r"url\([^)]*\)", text))


def test_an_interrupted_run(folder, words_alone, capsys):
    (folder / "result.json").unlink()
    (folder / "history.csv").unlink()
    text = text_of(folder)
    assert "did not come to its end" in text and "history of decisions is not there" in text
    assert "pruned to 0.5" in text and "Widths that are left" in text and "How it went" not in text
    for target in folder.glob("target-*"):
        shutil.rmtree(target)
    assert "no snapshot" in text_of(folder)


def test_a_run_without_evaluation(folder, words_alone):
    file = folder / "result.json"
    raw = json.loads(file.read_text())
    for row in (raw["dense"], *raw["snapshots"]):
        for key in [k for k in row if k.startswith("top1")]:
            row[key] = None
    file.write_text(json.dumps(raw))
    text = text_of(folder)
    assert "accuracy was not measured" in text and "How accurate it is was not measured" in text


def test_odd_numbers_and_damaged_parts_are_said_or_left_out(folder, words_alone):
    file = folder / "result.json"
    raw = json.loads(file.read_text())
    raw["snapshots"][0] |= {"top1": float("nan"), "latency_ms": "fast", "macs": 10**400}
    raw["snapshots"] += [3, {"top1": 1.0}]
    raw["recipe"] = [1]
    file.write_text(json.dumps(raw))
    (folder / "latency_table.json").write_text("{")
    (folder / "history.csv").write_text("step,predicted_ratio\n1,\n2,0.5\n")
    spec = folder / "target-0.5" / "spec.json"
    spec.write_text(spec.read_text().replace('"mlp": ', '"mlp": 1'))
    shutil.rmtree(folder / "target-0.6")
    text = text_of(folder)
    for line in ("has no target", "is not a latency table", "rows without a predicted_ratio", "spec.json is damaged"):
        assert line in text, line
    assert "the snapshot target-0.6/ is not there" in text and "nan" not in text.split("</style>")[1].lower()


def test_a_snapshot_alone_and_a_finetuning(folder, words_alone):
    where = folder / "target-0.5"
    text = text_of(where)
    assert "snapshot alone" in text and "Widths that are left" in text and "One model" in text
    write_result(where, {"metric": "top1", "top1_before": 50.0, "top1": 60.0, "epochs": 2, "recipe": {"lr": 0.1}})
    text = text_of(where)
    assert "before finetuning" in text and "60.00" in text and "<td>0.1</td>" in text


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "does not exist; nvit report takes the folder"),
        (lambda p: p.write_text(""), "is a file; nvit report takes"),
        (lambda p: p.mkdir(), "holds no result.json and no snapshot"),
        (lambda p: (p.mkdir(), (p / "result.json").write_text("{")), "result.json cannot be read"),
        (lambda p: (p.mkdir(), (p / "result.json").write_text("[]")), "holds a list, expected an object"),
        (lambda p: (p.mkdir(), (p / "result.json").write_text('{"dense_ms": 1}')), "are of another command"),
    ],
)
def test_what_no_report_can_be_of_is_one_line(make, says, tmp_path, capsys):
    make(tmp_path / "x")
    assert cli.main(["report", str(tmp_path / "x"), "--out", str(tmp_path / "r.html")]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nvit:")]
    assert len(said) == 1 and says in said[0] and not (tmp_path / "r.html").exists()


def test_a_page_takes_the_place_of_a_page_alone(folder, words_alone, tmp_path, capsys):
    mine = tmp_path / "notes.html"
    mine.write_text("<html>mine</html>")
    assert cli.main(["report", str(folder), "--out", str(mine)]) == 1
    assert "is no report of nvit's" in capsys.readouterr().err and mine.read_text() == "<html>mine</html>"
    assert cli.main(["report", str(folder), "--out", str(tmp_path)]) == 1
    result = (folder / "result.json").read_bytes()
    assert cli.main(["report", str(folder), "--out", str(folder / "result.html")]) == 0
    assert cli.main(["report", str(folder), "--out", str(folder / "result.html")]) == 0
    assert (folder / "result.json").read_bytes() == result


def test_runs_end_by_naming_the_page(whole, capsys):
    assert cli.main(["demo", "--resume", "--out", str(whole)]) == 0
    assert capsys.readouterr().out.endswith(f"nvit report {whole}\n")


def test_several_runs_share_a_curve(whole, words_alone, tmp_path):
    other = shutil.copytree(whole, tmp_path / "run")
    runs = [read(whole), read(other)]
    text = build(runs, ["a", "b"])
    assert "run (2)" in text and text.count("<h3>") == 10 and text.count("<h1>") == 1


def test_without_a_run_it_says_what_it_takes(capsys):
    assert cli.main(["report"]) == 2
    assert capsys.readouterr().err == "nvit: nvit report needs folders of runs, comparisons, finetunings or snapshots\n"
