"""What compute-sanitizer said is told: errors, a refusal, time that was over."""

import pytest

from benchmarks import sanitizer


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "10 passed in 3 s\n========= ERROR SUMMARY: 0 errors", 0),
        (3, "========= Invalid __global__ read\n========= ERROR SUMMARY: 4 errors", 1),
        (1, "2 failed, 3 passed in 4 s", 1),
        (255, "========= Error: Device not supported\n", sanitizer.SKIPPED),
        (None, "some output", sanitizer.SKIPPED),
    ],
)
def test_verdict(code, output, expected):
    found, line = sanitizer.verdict(code, output)
    assert found == expected and line


def test_a_missing_tool_is_a_reason(monkeypatch, capsys):
    monkeypatch.setattr(sanitizer, "tool", lambda: None)
    monkeypatch.setattr("sys.argv", ["sanitizer"])
    assert sanitizer.main() == sanitizer.SKIPPED and "not installed" in capsys.readouterr().out


@pytest.mark.parametrize(("codes", "expected"), [((0, 3), 1), ((0, None), 0), ((None, None), 77)])
def test_one_tool_s_errors_are_the_stage_s(codes, expected, monkeypatch, capsys):
    found = iter(codes)
    monkeypatch.setattr(sanitizer, "tool", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitizer, "run", lambda *a: sanitizer.verdict(next(found), "3 passed"))
    monkeypatch.setattr("sys.argv", ["sanitizer"])
    assert sanitizer.main() == expected and "memcheck: " in capsys.readouterr().out


def test_the_choice_is_of_tests_that_exist():
    """Every name in the expression is one of a function in the file."""
    text = (sanitizer.ROOT / sanitizer.FILE).read_text()
    words = {w.strip("()") for w in sanitizer.SMALL.split() if w.strip("()").startswith("test_")}
    assert words and all(f"def {word}" in text for word in words)


def test_a_hanging_tool_is_ended(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho started\nsleep 600\n")
    tool.chmod(0o755)
    code, line = sanitizer.run(str(tool), "memcheck", 1.0)
    assert code == sanitizer.SKIPPED and "time was over" in line
