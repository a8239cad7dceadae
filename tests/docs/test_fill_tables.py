"""The pages' tables are what their CSVs say; prose is left alone."""

import pytest

from docs import fill_tables
from docs.tables import base


@pytest.mark.parametrize("page", [p for p in fill_tables.PAGES if p != "models.md"])  # tests/test_models.py has that
def test_tables_are_up_to_date(page):
    text = (fill_tables.DOCS / page).read_text()
    assert fill_tables.filled(text, fill_tables.PAGES[page]) == text, f"run `python -m docs.fill_tables {page}`"


def test_every_page_with_a_marker_is_filled():
    marked = {
        p.relative_to(fill_tables.DOCS).as_posix()
        for p in fill_tables.DOCS.rglob("*.md")
        if "<!-- table:" in p.read_text()
    }
    assert marked == set(fill_tables.PAGES)


PAGE = "before\n<!-- table: a -->\nold | row\n<!-- end -->\nbetween\n<!-- table: b -->\n<!-- end -->\nafter\n"


def test_only_what_is_marked_changes():
    found = fill_tables.filled(PAGE, {"a": lambda: "new\n", "b": lambda: r"\1 other"})
    assert found == (
        "before\n<!-- table: a -->\nnew\n<!-- end -->\nbetween\n<!-- table: b -->\n\\1 other\n<!-- end -->\nafter\n"
    )


@pytest.mark.parametrize(
    ("text", "names"),
    [(PAGE, "a"), (PAGE, "abc"), (PAGE.replace("<!-- end -->\nafter", "after"), "ab"), (PAGE + "<!-- end -->", "ab")],
)
def test_a_marker_that_does_not_fit_is_refused(text, names):
    with pytest.raises(ValueError, match="table"):
        fill_tables.filled(text, {name: str for name in names})


def test_a_changed_csv_makes_the_page_old(tmp_path, monkeypatch, capsys):
    for file in base.RESULTS.glob("refit_*.csv"):
        (tmp_path / file.name).write_text(file.read_text().replace("80.692", "79.692"))
    monkeypatch.setattr(base, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["fill_tables", "--check", "refit.md"])
    assert fill_tables.main() == 1 and "refit.md" in capsys.readouterr().out
