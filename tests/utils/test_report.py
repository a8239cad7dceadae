"""Tables for people: what fits is shown whole, what does not is left out by name."""

import io
import re

import pytest
from rich.console import Console

from nvit.utils.report import DROPPED, FORMATS, show

ROW = {
    "params": 274_123_456,
    "macs": 17.58e9,
    "predicted_ratio": 0.512,
    "measured_ratio": 0.534,
    "latency_ms": 274.31,
    "images_per_s": 233.3,
    "speedup": 1.87,
    "peak_memory": 1.234e9,
    "top1": 81.27,
    "top5": 95.61,
}
ROWS = [{"name": "deit_base_distilled_patch16_224"} | ROW, {"name": "/a/long/path/nvit_family/target-0.54"} | ROW]


def at(width: int, title: str = "a title") -> str:
    out = io.StringIO()
    show(title, ROWS, Console(file=out, force_terminal=True, color_system=None, width=width))
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_no_number_is_cut_and_what_is_missing_is_said(width):
    shown = at(width)
    assert max(map(len, shown.splitlines())) <= width and "…" not in shown
    assert "274.31" in shown and "81.27" in shown, "latency and accuracy stay"
    table, _, said = shown.partition("no room at")
    missing = said.replace("\n", " ").strip().partition(": ")[2].split(", ")
    for key in FORMATS.keys() & ROW.keys():
        head, in_words = FORMATS[key]
        assert (in_words(ROW[key]) in table and head in table) != (head in missing), key


def test_with_room_nothing_is_left_out():
    assert "no room" not in at(200) and "no room" in at(80)
    assert set(DROPPED) <= FORMATS.keys()


def test_names_are_whole_and_titles_break_between_words():
    shown = at(80, "vit_base_patch16_224.augreg2_in21k_ft_in1k: 64 images a batch on cuda:0, bfloat16, graph, of a run")
    assert "nvit_family/target-0.54" in shown and "deit_base_distilled_patch16_224" in shown
    assert "vit_base_patch16_224.augreg2_in21k_ft_in1k:" in shown.splitlines()[0]


def test_what_goes_to_a_file_is_wide(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    out = io.StringIO()
    show("t", ROWS, Console(file=out))
    assert "no room" not in out.getvalue()
    monkeypatch.setenv("COLUMNS", "80")
    show("t", ROWS, Console(file=out))
    assert "no room at 80 columns" in out.getvalue()
