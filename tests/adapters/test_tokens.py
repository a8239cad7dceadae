"""Models whose tokens merge: masked equals compact equals saved equals exported; who cannot merge says why."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from nvit import LatencyTable, adapters, snapshot
from nvit.analysis.evaluate import macs
from nvit.calibration.replay import Replay
from nvit.layers.merging import counts
from nvit.spec import ViTSpec
from nvit.structure.compact import compact
from nvit.structure.masks import apply_
from tests.families import HOSTS
from tests.hosts import images, labels, make, random_masks

MERGES = (5, 3)
LARGE = {"img_size": 32}  # 16 patches
KINDS = ["plain", "deit_distilled", "registers", "average_pooling", "qk_norm", "swiglu"]


def merging(kind="plain", **more):
    """A model whose tokens merge, its groups and three images."""
    model = adapters.merge_(make(kind, **LARGE, **more), MERGES)
    return model, adapters.find(model).groups(model), images(model)


def logits(model, x):
    with torch.no_grad():
        return torch.cat([t for t in adapters.find(model).logits(model, x) if t is not None], -1)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_equals_compact_equals_loaded(kind, tmp_path):
    model, groups, x = merging(kind)
    plain = logits(adapters.merge_(make(kind, **LARGE), ()), x)
    masks = random_masks(groups)
    apply_(model, groups, masks)
    expected = logits(model, x)
    assert (expected - plain).abs().max() > 1e-3
    small = compact(model, groups, masks)
    snapshot.save(tmp_path / "s", model)
    loaded = snapshot.load(tmp_path / "s")
    for other in (small, loaded):
        torch.testing.assert_close(logits(other, x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        assert adapters.merges(other) == MERGES
    assert list(loaded.state_dict()) == list(make(kind, **LARGE).state_dict())


def test_exported_for_any_batch_equals_the_model():
    """As a program of torch, and in ONNX's own runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, _, x = merging()
    expected, batch = logits(model, x), torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=1e-5)
    session = onnxruntime.InferenceSession(torch.onnx.export(program, verbose=False).model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_merging_nothing_is_the_model_again():
    model, _, x = merging()
    names = [type(m) for m in make("plain").modules() if "Block" in type(m).__name__]
    adapters.merge_(model, ())
    assert adapters.merges(model) == () and type(model.blocks) is nn.Sequential
    assert [type(block) for block in model.blocks] == names
    torch.testing.assert_close(model(x), make("plain", **LARGE)(x))


def test_every_token_is_back_at_its_place_at_the_end():
    """So that a pooling weighs each by its size, and a dense head finds as many as came in."""
    model, _, x = merging("average_pooling")
    tokens = model.forward_features(x)
    assert tokens.shape[1] == 16
    assert all(len(torch.unique(t.detach(), dim=0)) == 16 - sum(MERGES) for t in tokens)


def test_a_block_alone_is_refused():
    model, _, x = merging()
    masked = partial(model.forward_features, x, attn_mask=torch.zeros(17, 17))
    for call in (partial(model.forward_intermediates, x), masked):
        with pytest.raises(ValueError, match=r"called alone .*nvit.adapters.merge_\(model, \(\)\)"):
            call()


def test_training_reaches_every_parameter():
    model, _, x = merging("deit_distilled")
    model.train()
    out = adapters.find(model).logits(model, x)
    torch.nn.functional.cross_entropy(out.mean, labels(model, 3)).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_block_by_block_as_at_once():
    model, _, x = merging()
    replay = Replay(model)
    replay.enter(x)
    with torch.no_grad():
        replay.advance()
        replay.advance()
        torch.testing.assert_close(replay.inputs[0][0].cls, model(x))


def test_multiply_accumulates_by_tokens(tmp_path):
    model, _, _ = merging()
    table = LatencyTable.analytic(model)
    # What the counter sees besides: the similarities of every merge, 8 by 8 and 6 by 5 tokens of 16 dims.
    assert macs(model, (3, 32, 32)) / 1e9 == pytest.approx(table.dense_ms, rel=0.01)
    assert table.dense_ms < 0.85 * LatencyTable.analytic(make("plain", **LARGE)).dense_ms
    assert [p.name for p in table.parts] == ["attention.17.5", "mlp.12", "attention.12.3", "mlp.9", "rest"]
    table.save(tmp_path / "t.json")
    assert LatencyTable.load(tmp_path / "t.json").parts == table.parts
    assert counts(17, MERGES) == [17, 12, 9]


def test_a_table_is_measured_at_the_tokens_of_every_block():
    model, _, _ = merging()
    table = LatencyTable.measure(model, batch_size=2, seconds=0.2)
    assert table.dense_ms > 0 and set(table.grids) == {p.name for p in table.parts}


@pytest.mark.parametrize(
    ("name", "reason"),
    [("swin_plain", "windows forbid it"), ("eva_eva02", "a merged token has several"), ("hf_vit", "one by one")],
)
def test_who_cannot_merge_says_why(name, reason):
    name = next((n for n in HOSTS if n == name), next(n for n in HOSTS if n.startswith(name.partition("_")[0])))
    with pytest.raises(ValueError, match=f"tokens cannot merge: .*{reason}"):
        adapters.merge_(HOSTS[name](), (1,))


@pytest.mark.parametrize(
    ("merges", "said"),
    [((1,), "name 1 blocks of a model of 2"), ((9, 0), "block 0 merges 9 of 17"), ((8, 5), "block 1 merges 5 of 9")],
)
def test_what_does_not_fit_is_named(merges, said):
    with pytest.raises(ValueError, match=said):
        adapters.merge_(make("plain", **LARGE), merges)


def test_a_spec_says_it_and_older_ones_say_nothing():
    model, _, _ = merging()
    spec = snapshot.spec_of(model)
    assert ViTSpec.from_json(spec.to_json()).merges == MERGES
    raw = json.loads(spec.to_json())
    with pytest.raises(ValueError, match="merges are"):
        ViTSpec.from_json(json.dumps(raw | {"merges": [-1, 2]}))
    del raw["merges"]
    assert ViTSpec.from_json(json.dumps(raw)).merges == ()
