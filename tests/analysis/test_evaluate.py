"""Accuracy, parameters and memory against counts by hand."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nvit.analysis import evaluate
from nvit.analysis.evaluate import accuracy, macs, parameters, peak_memory
from nvit.cli import main as cli
from nvit.structure.compact import compact
from tests.hosts import images, make, masked


class Lookup(nn.Module):
    """Answers with the logits it is asked for."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, index):
        return self.table[index]


def loader(labels, batch):
    return DataLoader(TensorDataset(torch.arange(len(labels)), labels), batch)


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_accuracy_counts_what_a_sort_counts(batch):
    table = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(12, (50,), generator=torch.Generator().manual_seed(1))
    order = table.argsort(1, descending=True)
    model = Lookup(table).train()
    got = accuracy(model, loader(labels, batch))
    assert got["top1"] == 100 * sum(int(o[0] == y) for o, y in zip(order, labels, strict=True)) / 50
    assert got["top5"] == 100 * sum(int(y in o[:5]) for o, y in zip(order, labels, strict=True)) / 50
    assert got["loss"] == pytest.approx(nn.functional.cross_entropy(table, labels).item(), rel=1e-5)
    assert got["images"] == 50 and got["images_per_s"] > 0
    assert model.training, "the mode is put back"


def test_top5_of_fewer_classes_is_everything():
    assert accuracy(Lookup(torch.randn(6, 3)), loader(torch.zeros(6, dtype=torch.long), 2))["top5"] == 100


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="gave no image"):
        accuracy(Lookup(torch.randn(1, 3)), [])


def test_progress_is_told():
    seen = []
    accuracy(Lookup(torch.eye(3)), loader(torch.arange(3), 1), progress=lambda *a: seen.append(a))
    assert [s[:2] for s in seen] == [(1, 3), (2, 3), (3, 3)] and "100.00 %" in seen[-1][2]


def test_compiled_once_with_the_last_batch_padded_and_equal_counts(monkeypatch):
    model, shapes = make("plain"), []

    def backend(graph, inputs):
        shapes.append([t.shape[0] for t in inputs if t.dim() == 4 and t.shape[1:] == (3, 16, 16)])
        return graph

    monkeypatch.setattr(evaluate, "compiled", partial(evaluate.compiled, backend=backend))
    data = DataLoader(TensorDataset(images(model, 11), torch.arange(11) % 7), 4)
    eager, fast = accuracy(model, data), accuracy(model, data, compile=True)
    assert shapes == [[4]], "the batch of three was compiled for itself"
    assert fast["images"] == 11 and (fast["top1"], fast["top5"]) == (eager["top1"], eager["top5"])
    assert fast["loss"] == pytest.approx(eager["loss"], rel=1e-5)


def test_the_command_compiles_where_it_is_told_to(monkeypatch, capsys):
    asked = []

    def compiled(function, **options):
        asked.append(options)
        return function

    monkeypatch.setattr(evaluate, "compiled", compiled)
    args = ["evaluate", "digits", "--eval-images", "20", "--batch-size", "8", "--device", "cpu"]
    assert cli.main(args) == 0 and not asked
    assert cli.main([*args, "--compile"]) == 0 and len(asked) == 1
    assert "images/s" in capsys.readouterr().out


def test_parameters_and_macs_of_a_model_by_hand():
    model = make("plain")
    block = 4 * 48 * 48 + 4 * 48 + 2 * 48 * 96 + 96 + 48 + 4 * 48
    assert parameters(model) == 2 * block + 48 * 192 + 48 + 48 + 5 * 48 + 2 * 48 + 7 * 48 + 7
    tokens = 5
    per_block = tokens * (4 * 48 * 48 + 2 * 48 * 96) + 2 * tokens * tokens * 48
    assert macs(model, (3, 16, 16)) == 2 * per_block + 4 * 192 * 48 + 7 * 48


def test_a_compact_model_costs_less():
    model, groups, masks = masked("plain", keep=0.5)
    small, x = compact(model, groups, masks), images(model, 4)
    assert parameters(small) < 0.4 * parameters(model)
    assert macs(small, x.shape[1:]) < 0.4 * macs(make("plain"), x.shape[1:])
    assert peak_memory(small, x) < 0.7 * peak_memory(make("plain"), x)


def test_peak_memory_holds_at_least_weights_input_and_the_largest_activation():
    model = make("plain")
    x = images(model, 8)
    weights = 4 * parameters(model)
    hidden = 4 * 8 * 5 * 96
    assert peak_memory(model, x) >= weights + x.numel() * 4 + 2 * hidden
