"""Every figure at both sizes: no text on another, none cut off; colours that survive grey and colour blindness."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.accuracy import deit_tiny, refit_peers
from benchmarks.figure import figure as kernel_figure
from benchmarks.harness import RESULTS, Row
from docs.tables import figures as pages
from nvit.analysis.accuracy_curve import Against, plot_accuracy
from nvit.analysis.correlation import plot as plot_correlation
from nvit.analysis.diversity import plot as plot_diversity
from nvit.analysis.prediction import plot as plot_prediction
from nvit.analysis.sensitivity import STRUCTURES
from nvit.analysis.sensitivity import plot as plot_sensitivity
from nvit.analysis.widths import plot_widths
from nvit.spec import KINDS, BlockWidths
from nvit.tasks.classification import standard_error
from nvit.utils import style
from tests.figures import SIZES, collisions, texts_drawn

DENSE = [BlockWidths(768, 12, 64, 64, 3072)] * 12
MODELS = {
    f"runs/imagenet/target-{t:g}": [
        BlockWidths(int(768 * t), 1 + int(11 * t * (i % 4) / 3), 8 + int(5 * t * i), 64, int(t * (400 + 200 * i)))
        for i in range(12)
    ]
    for t in (0.8, 0.65, 0.5)
}


def bundles(criteria):
    """Rows as `correlation.rows_of` gives them, over many decades and with losses that fall."""
    draw = np.random.default_rng(0)
    return [
        {"kind": kind, "loss_change": float(draw.normal() * 10.0 ** draw.integers(-6, 1))}
        | {name: 10.0 ** float(draw.uniform(-12, 1)) for name in criteria}
        for kind in KINDS
        for _ in range(30)
    ]


def widths(path, pixels):
    plot_widths(MODELS, path, DENSE, pixels)


def widths_of_one_block(path, pixels):
    plot_widths({"tiny": [BlockWidths(16, 1, 8, 8, 16)]}, path, None, pixels)


def correlation(path, pixels):
    names = ("hessian", "curvature", "magnitude", "remaining")
    plot_correlation(bundles(names), names, path, 1300, pixels)


def sensitivity(path, pixels):
    """Traces over two decades with errors, some of a Hessian's below zero."""
    draw = np.random.default_rng(0)
    rows = [
        {"structure": name, "block": block, "trace": draw.normal(1, 1), "trace_se": 0.1}
        | {"gauss_newton": 10.0 ** draw.uniform(-7, -5), "gauss_newton_se": 1e-7}
        for name in STRUCTURES
        for block in (*range(12), "all")
    ]
    plot_sensitivity(rows, path, 512, pixels)


def diversity(path, pixels):
    """One model that has lost all heads but one in a block."""
    rows = [{"block": b, "map_distance": 0.1 + b / 20, "output_distance": 0.9 - b / 20} for b in range(12)]
    few = [r | (dict.fromkeys(("map_distance", "output_distance")) if r["block"] == 4 else {}) for r in rows]
    plot_diversity({"deit_base_patch16_224": rows, "runs/imagenet/target-0.5": few}, path, 256, pixels)


def prediction(path, pixels):
    draw = np.random.default_rng(0)
    rows = [
        {"predicted_ratio": s, "measured_ratio": s / (1 + e), "measured_spread": 0.02, "error": e}
        for s, e in zip(draw.uniform(0.2, 1, 24), draw.normal(0, 0.05, 24), strict=True)
    ]
    plot_prediction(rows, path, pixels)


def accuracy(path, pixels):
    rows = [
        {"top1": 80 - 60 * (1 - s) ** 2, "macs": s, "ms": 100 * s, "ms_low": 98 * s, "ms_high": 105 * s}
        for s in (0.3, 0.5, 0.8, 1)
    ]
    against = [Against("ms", "measured ms, 8 images a batch"), Against("macs", "share of dense MACs")]
    lines = {f"a method of pruning, number {i}": rows for i in range(5)}
    plot_accuracy(lines, against, path, images=1300, title="DeiT-Ti pruned in one shot", pixels=pixels)


def deit(path, pixels):
    with (RESULTS / "deit_tiny_cpu.csv").open() as f:
        deit_tiny.plot(list(csv.DictReader(f)), path, pixels)


def refit(path, pixels):
    refit_peers.plot(RESULTS, path, pixels)


def kernels(path, pixels):
    rows = [
        Row(case=f"attention forward+backward deit_base b2, {c}", provider=p, median_ms=m, p20_ms=m - 1, p80_ms=m + 2)
        for c in ("dense", "half of the heads")
        for p, m in (("nvit", 3.0), ("sdpa of all heads, then zeros", 9.0), ("eager", 7.0))
    ]
    kernel_figure(rows, "attention", path, "nvit", pixels)


FIGURES = [
    widths,
    widths_of_one_block,
    correlation,
    sensitivity,
    diversity,
    prediction,
    accuracy,
    deit,
    refit,
    kernels,
    pages.saliency,
    pages.correlation,
]


@pytest.mark.parametrize("pixels", SIZES)
@pytest.mark.parametrize("draw", FIGURES, ids=lambda f: f"{f.__module__.split('.')[0]}.{f.__name__}")
def test_no_text_lies_on_another_or_is_cut_off(draw, pixels, tmp_path):
    with texts_drawn() as found:
        draw(tmp_path / "figure.png", pixels)
    assert len(found) > 10 and not collisions(found)
    assert Image.open(tmp_path / "figure.png").size[0] == pixels


def test_the_look_sees_overlap_and_text_that_is_cut_off(tmp_path):
    figure = Figure((3, 2))
    figure.text(0.5, 0.5, "one word")
    figure.text(0.55, 0.5, "another")
    figure.text(0.95, 0.1, "outside")
    with texts_drawn() as found:
        figure.savefig(tmp_path / "figure.png")
    assert collisions(found) == ["'one word' lies on 'another'", "'outside' is cut off"]


def drawn_axes(monkeypatch, draw, path):
    """Axes of a figure as it is saved."""
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (save(self, *a, **k), kept.extend(self.axes))[0])
    draw(path, 1600)
    return kept


def test_widths_show_whole_blocks_and_heads_the_dense_model_behind_and_every_line_inside(monkeypatch, tmp_path):
    axes = drawn_axes(monkeypatch, widths, tmp_path / "widths.png")
    assert [a.get_title() for a in axes] == ["EMB", "heads", "QK per head", "V per head", "MLP"]
    for panel, kind in zip(axes, KINDS, strict=True):
        for ticks in (panel.get_xticks(), panel.get_yticks()):
            assert all(float(t).is_integer() for t in ticks), kind
        bars = [b.get_height() for b in panel.patches]
        assert bars == [getattr(b, kind) for b in DENSE]
        low, high = panel.get_ylim()
        for line in panel.lines:
            assert low < min(line.get_ydata()) and max(line.get_ydata()) < high
            assert line.get_zorder() > panel.patches[0].get_zorder()
    assert sorted({line.get_ydata()[0] for line in axes[0].lines}) == [384, 499, 614]


def test_a_correlation_says_how_many_images_it_is_from(tmp_path):
    with texts_drawn() as found:
        correlation(tmp_path / "figure.png", 600)
    texts = [text for text, _, _ in found.values()]
    assert "150 bundles removed one by one, 1300 images" in texts


def test_an_accuracy_curve_has_bars_of_the_standard_error_and_of_the_timing(monkeypatch, tmp_path):
    axes = drawn_axes(monkeypatch, accuracy, tmp_path / "figure.png")
    assert len(axes) == 2 and axes[0].get_xlabel().startswith("measured ms")
    line, _, bars = axes[0].containers[0]
    across, upright = (b.get_segments() for b in bars)
    top = line.get_ydata()[-1]
    assert upright[-1][:, 1] == pytest.approx([top - standard_error(top, 1300), top + standard_error(top, 1300)])
    assert across[-1][:, 0] == pytest.approx([98, 105])


def seen_by(rgb, matrix):
    return np.clip(matrix @ np.array(rgb), 0, 1)


BLIND = {  # Machado et al. 2009, severity 1, in linear light
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("kind", BLIND)
def test_neighbouring_colours_differ_for_the_colour_blind(kind):
    linear = [np.array(to_rgb(c)) ** 2.2 for c in style.COLOURS]
    seen = [seen_by(c, np.array(BLIND[kind])) ** (1 / 2.2) for c in linear]
    for (i, a), (j, b) in itertools.combinations(enumerate(seen), 2):
        assert np.abs(a - b).max() > 0.12, (i, j)


def test_on_grey_paper_neighbours_differ_in_lightness_and_all_in_marker_and_dash():
    grey = [float(np.dot(to_rgb(c), (0.299, 0.587, 0.114))) for c in style.COLOURS]
    assert min(abs(a - b) for a, b in itertools.pairwise(grey)) > 0.1
    looks = [style.line(i) for i in range(len(style.COLOURS))]
    assert len({str(look["marker"]) for look in looks}) == len({str(look["linestyle"]) for look in looks}) == len(looks)


def test_drawing_leaves_the_users_matplotlib_as_it_was(tmp_path):
    import matplotlib

    before = (matplotlib.get_backend(auto_select=False), matplotlib.rcParams["axes.grid"])
    widths(tmp_path / "figure.png", 600)
    assert (matplotlib.get_backend(auto_select=False), matplotlib.rcParams["axes.grid"]) == before


def test_the_saliency_screen_names_what_users_can_choose(tmp_path):
    with texts_drawn() as found:
        pages.saliency(tmp_path / "figure.png", 1600)
    names = {text for text, _, _ in found.values()}
    assert {"hessian", "curvature", "fisher", "abs"} <= names and not {"second order", "pairs", "roots"} & names


def test_figures_in_the_pages_are_of_this_style():
    """As wide as `PIXELS` says: a figure drawn before, or by hand, is not."""
    root = Path(pages.__file__).parents[2]
    for path in (*(f"docs/{name}" for name in pages.FIGURES), "benchmarks/results/refit_cpu.png"):
        assert Image.open(root / path).size[0] == 1600, path
