"""The page's figures at both of its widths: no text on another or cut off, whatever runs are called."""

import pytest

from nvit.report import figures
from nvit.report.model import Model, Run
from nvit.report.sections import gain, widths
from nvit.report.suggestion import knee_of
from nvit.report.svg import NARROW, WIDE
from nvit.spec import BlockWidths
from tests.figures import collisions, texts_drawn


def run(name="run", points=6):
    dense = Model("dense", {"latency_ms": 900.0, "top1": 80.77, "top1_se": 1.1}, dense=True)
    rows = [
        {
            "latency_ms": 900 * t,
            "top1": 80 - 60 * (1 - t) ** 3,
            "top1_se": 1.2,
            "measured_ratio": t,
            "measured_spread": 0.02,
            "predicted_ratio": t,
        }
        for t in [0.9, 0.8, 0.7, 0.6, 0.5, 0.4][:points]
    ]
    history = tuple({"step": 10.0 * i, "predicted_ratio": 1 - 0.05 * i} for i in range(12))
    models = [Model(f"pruned to {r['measured_ratio']:g}", r, r["measured_ratio"]) for r in rows]
    return Run(name, "prune", (dense, *models), history=history)


def one_curve(path, pixels):
    figures.curve([run()], {"run": knee_of(run())}, "latency_ms", "ms, 1024 images a batch")(path, pixels)


def three_curves(path, pixels):
    runs = [run(f"{i} $a name_{{ of a run {'x' * 40}") for i in range(3)]
    figures.curve(runs, {r.name: knee_of(r) for r in runs}, "ratio", "latency, as a fraction of dense (or predicted)")(
        path, pixels
    )


def foretold(path, pixels):
    figures.foretold(run())(path, pixels)


def history(path, pixels):
    figures.history(run())(path, pixels)


@pytest.mark.parametrize("pixels", [WIDE, NARROW])
@pytest.mark.parametrize("draw", [one_curve, three_curves, foretold, history], ids=lambda f: f.__name__)
def test_no_text_lies_on_another_or_is_cut_off(draw, pixels, tmp_path):
    with texts_drawn() as found:
        draw(tmp_path / "figure.svg", pixels)
    assert len(found) > 10 and not collisions(found)


def test_widths_on_a_phone(tmp_path):
    from nvit.analysis.widths import plot_widths

    names = [f"pruned to {t}" for t in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)]
    models = {name: [BlockWidths(192, 3, 64, 64, 768)] * 12 for name in names}
    with texts_drawn() as found:
        plot_widths(models, tmp_path / "figure.svg", None, NARROW)
    assert set(names) <= {text for text, _, _ in found.values()} and not collisions(found)


def test_the_curve_says_in_words_what_it_shows():
    (shown,) = gain([run()]).figures
    assert "dense: 80.77 at 1.00 of the dense latency; pruned to 0.9: 79.94" in shown.wide
    assert "knee" in shown.caption and widths(run()) is None
