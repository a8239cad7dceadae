"""Classes of pixels: loss, distance, draws, probes and meter against formulas written out."""

import math

import pytest
import torch
from torch import nn

import nvit
from nvit import adapters, tasks
from nvit.adapters import Logits
from nvit.structure import snapshot
from nvit.tasks.segmentation import IGNORE, Segmentation
from nvit.training.trainer import training_
from tests.hosts import make

G = torch.Generator().manual_seed(0)
OUT, OTHER = (torch.randn(4, 3, 2, 5, generator=G, dtype=torch.float64) * 2 for _ in range(2))
LABELS = torch.randint(3, (4, 2, 5), generator=G)
LABELS[0, 0, :3] = IGNORE
LABELS[3] = IGNORE
EXACT = {"rtol": 1e-10, "atol": 1e-12}
TASK = Segmentation(3)


def test_loss_and_distance_by_hand():
    p = OUT.softmax(1)
    each = []
    for i in range(4):
        here = [(r, c) for r in range(2) for c in range(5) if LABELS[i, r, c] != IGNORE]
        each.append(sum(-math.log(p[i, LABELS[i, r, c], r, c]) for r, c in here) / max(1, len(here)))
    assert float(TASK.loss(Logits(OUT), LABELS)) == pytest.approx(sum(each) / 4)
    q, s = (OTHER / 3).softmax(1), (OUT / 3).softmax(1)
    by_hand = (q * (q / s).log()).sum() / (4 * 2 * 5)
    torch.testing.assert_close(TASK.distance(Logits(OUT), Logits(OTHER), 3.0), by_hand, **EXACT)
    parts = [TASK.loss(Logits(OUT[rows]), LABELS[rows]) / 2 for rows in (slice(2), slice(2, None))]
    torch.testing.assert_close(sum(parts), TASK.loss(Logits(OUT), LABELS), **EXACT)  # parts of a batch add up


def test_a_probe_has_the_second_moment_of_the_loss_hessian():
    z, y = OUT[:1, :, :1, :2], torch.tensor([[[0, 2]]])
    hessian = torch.autograd.functional.hessian(lambda v: TASK.loss(Logits(v.view(z.shape)), y), z.flatten())
    draws = TASK.probe(z.expand(60_000, -1, -1, -1), torch.Generator().manual_seed(1)).flatten(1)
    off = (draws.T @ draws / len(draws) - hessian).abs().max() / hessian.abs().max()
    assert off < 0.03, off


def test_drawn_labels_come_from_the_softmax_and_rows_from_their_batch():
    torch.manual_seed(0)
    drawn = TASK.draw(OUT[:1].expand(20_000, -1, -1, -1))
    shares = nn.functional.one_hot(drawn, 3).double().mean(0).movedim(-1, 0)
    assert float((shares - OUT[0].softmax(0)).abs().max()) < 0.02
    torch.manual_seed(3)
    whole = TASK.draw(OUT)
    torch.manual_seed(3)
    assert torch.equal(TASK.draw(OUT[[1, 3]], [1, 3], 4), whole[[1, 3]])


def test_the_meter_by_hand():
    meter = TASK.meter()
    meter.add(OUT[:1].float(), LABELS[:1])
    meter.add(OUT[1:].float(), LABELS[1:])
    answers, seen = OUT.argmax(1), LABELS != IGNORE
    unions = []
    for c in range(3):
        mine, theirs = (answers == c) & seen, (c == LABELS) & seen
        unions.append(float((mine & theirs).sum() / (mine | theirs).sum()))
    found = meter.value()
    assert found["miou"] == pytest.approx(100 * sum(unions) / 3, abs=1e-3)
    assert found["pixel_accuracy"] == pytest.approx(100 * float((answers == LABELS)[seen].float().mean()), abs=1e-3)
    with pytest.raises(ValueError, match="no pixel of the evaluated images has a label"):
        TASK.meter().value()


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.zeros(2, 8, 9, dtype=torch.long), r"int64 \(2, 8, 9\); task segmentation expects .*\(2, 8, 8\)"),
        (torch.full((2, 8, 8), 3), "a pixel's label is 3, but the model has 3 classes.*--ignore-label"),
        (None, "reads labels"),
    ],
)
def test_labels_that_are_none_of_pixels_are_refused(labels, said):
    with pytest.raises(ValueError, match=said):
        TASK.labels(torch.zeros(2, 3, 8, 8), labels)


def test_augmentation_of_images_alone_is_refused():
    with pytest.raises(ValueError, match="auto_augment changes images without their labels"):
        TASK.check(nvit.FinetuneConfig(auto_augment="rand-m9-mstd0.5-inc1"))


def test_a_head_and_its_task_belong_together():
    with pytest.raises(ValueError, match="needs a model with a head for pixels"):
        tasks.of("segmentation", make("plain"))
    pixels = adapters.segmenter(make("plain"), ["a", "b"])
    assert tasks.of("auto", pixels).name == "segmentation"
    with pytest.raises(ValueError, match="whose head is for pixels"):
        tasks.of("classification", pixels)


@pytest.mark.parametrize(("variant", "said"), [("map", "pools its tokens by attention")])
def test_tokens_without_a_map_are_refused(variant, said):
    with pytest.raises(ValueError, match=said):
        adapters.segmenter(make("plain", global_pool=variant, class_token=False), ["a", "b"])


def test_batch_norms_learn_while_everything_else_evaluates():
    model = adapters.segmenter(make("plain"), ["a", "b"])
    training_(model, False)
    assert model.norm.training and not model.host.training
    before = model.norm.running_mean.clone()
    model(torch.randn(2, 3, 16, 16))
    assert bool((model.norm.running_mean != before).any())


def test_a_pruned_model_gets_a_head_and_another_image_size(tmp_path):
    """Prune first, then a head at 24 × 16: reloaded, it computes the same and knows its classes."""
    small = nvit.load(snapshot.save(tmp_path / "s", adapters.find(m := make("plain")).prepare(m)))
    adapters.find(small).set_image_size_(small, (24, 16))
    model = adapters.segmenter(small, ["sky", "road"]).eval()
    again = nvit.load(snapshot.save(tmp_path / "p", model))
    x = torch.randn(2, 3, 24, 16)
    torch.testing.assert_close(again(x), model(x))
    assert again(x).shape == (2, 2, 24, 16) and adapters.label_names(again) == {"sky": 0, "road": 1}
    with pytest.raises(ValueError, match="20 is no multiple"):
        adapters.find(model).set_image_size_(model, (20, 16))
