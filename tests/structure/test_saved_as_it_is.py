"""What a snapshot says is what the model does: whatever was changed after pruning is saved, or refused by its name."""

import copy

import pytest
import timm
import torch
import transformers
from timm.layers import DropPath
from torch import nn

from nvit import adapters, snapshot
from nvit.structure import verify
from nvit.structure.compact import compact
from nvit.structure.masks import apply_
from nvit.utils.memory import LiveBytes
from tests.families import HOSTS
from tests.hosts import TINY, make, masked, random_masks, randomise_


def pruned(name: str, **more):
    """A compact model of a tiny host."""
    host = HOSTS[name]() if name in HOSTS else make(name, **more)
    model = adapters.find(host).prepare(host)
    groups = adapters.find(model).groups(model)
    return compact(model, groups, random_masks(groups)).eval()


def outputs(model, seed: int = 5):
    size = adapters.preprocess(model)["input_size"]
    x = torch.randn(3, *size, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()))
    with torch.no_grad():
        return torch.cat([t for t in adapters.find(model).logits(model, x) if t is not None], -1)


def assert_saved_as_it_is(path, model):
    again = snapshot.load(snapshot.save(path, model))
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=1e-5 * float(outputs(model).abs().max()))
    assert snapshot.spec_of(again) == snapshot.spec_of(model)
    assert snapshot.spec_of(again).to_json() == (path / "spec.json").read_text()
    return again


def assert_refused(path, model, says: str):
    with pytest.raises(ValueError, match=says) as e:
        snapshot.save(path, model)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400
    assert not list(path.parent.iterdir()), "nothing is written"


def reset(**arguments):
    def change(model):
        model.reset_classifier(**arguments)
        heads = model.get_classifier()
        for head in heads if isinstance(heads, tuple) else (heads,):
            randomise_(head)

    return change


def new_head(model):
    model.head = randomise_(nn.Linear(model.embed_dim, 5))


def attribute(place: str, key: str, value):
    return lambda model: setattr(model.get_submodule(place), key, value)


def drop_path(model):
    for i, block in enumerate(model.blocks):
        block.drop_path1, block.drop_path2 = DropPath(0.1 * i).eval(), DropPath(0.2).eval()


CHANGES = {
    "ten classes, averaged": ("plain", reset(num_classes=10, global_pool="avg")),
    "no classes": ("plain", reset(num_classes=0)),
    "a new head": ("plain", new_head),
    "a new head, EVA": ("eva_rope_mixed", reset(num_classes=4, global_pool="avg")),
    "a new head, BEiT": ("beit_both", reset(num_classes=4)),
    "a new head, Swin": ("swin_three_stages", reset(num_classes=4, global_pool="max")),
    "a new head, distilled": ("vit_deit_distilled", reset(num_classes=4)),
    "a scale": ("plain", attribute("blocks.1.attn", "scale", 0.5)),
    "an epsilon": ("plain", attribute("blocks.0.norm2", "eps", 0.1)),
    "an activation": ("plain", attribute("blocks.1.mlp", "act", nn.ReLU())),
    "an activation with a number": ("plain", attribute("blocks.1.mlp", "act", nn.LeakyReLU(0.3))),
    "GELU by tanh": ("plain", attribute("blocks.1.mlp", "act", nn.GELU(approximate="tanh"))),
    "an activation, EVA": ("eva_rope_mixed", attribute("blocks.1.mlp", "act", nn.ReLU())),
    "an activation, Swin": ("swin_three_stages", attribute("layers.1.blocks.0.mlp", "act", nn.SiLU())),
    "a scale, HF": ("hf_dinov2_registers", attribute("dinov2_with_registers.encoder.layer.1.attention", "scale", 0.5)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_saved(change, tmp_path):
    name, make_change = CHANGES[change]
    model = pruned(name)
    before = outputs(model)
    make_change(model)
    after = outputs(model)
    assert after.shape != before.shape or (after - before).abs().max() > 3e-5, "it changes what the model does"
    assert_saved_as_it_is(tmp_path / "s", model)


@pytest.mark.parametrize(
    "host", ["plain", "vit_qk_norm", "eva_rope_mixed", "eva_dinov3", "beit_both", "beit_shared", "registers"]
)
def test_another_input_size_is_saved(host, tmp_path):
    if host not in HOSTS and host not in ("plain", "registers"):
        pytest.skip("no such host")
    model = pruned(host)
    side = 2 * model.patch_embed.img_size[0]
    model.set_input_size((side, side))
    again = assert_saved_as_it_is(tmp_path / "s", model)
    assert adapters.preprocess(again)["input_size"][-2:] == (side, side)


def test_beits_own_tables_are_resampled_as_timms_are():
    from tests.families.beit import HOSTS as BEITS

    host = BEITS["beit_both"]()
    model = adapters.find(host).prepare(copy.deepcopy(host))
    for m in (host, model):
        m.set_input_size((64, 48))
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(x), host(x), rtol=0, atol=1e-5)


def test_a_new_head_is_pruned_further_with_the_stream():
    model = pruned("plain")
    new_head(model)
    adapter = adapters.find(model)
    groups = adapter.groups(adapter.prepare(model))
    masks = random_masks(groups, 0.5)
    small = compact(model, groups, masks)
    assert small.head.weight.shape == (5, int(masks["emb"].sum())) and adapters.classes(small) == 5
    apply_(model, groups, masks)
    torch.testing.assert_close(outputs(small), outputs(model), rtol=0, atol=1e-5)


def training_only(model):
    return {n: m.p if isinstance(m, nn.Dropout) else m.drop_prob for n, m in model.named_modules() if _drops(m)}


def _drops(m) -> bool:
    return (isinstance(m, nn.Dropout) and m.p > 0) or (isinstance(m, DropPath) and m.drop_prob > 0)


DROPS = {"drop_rate": 0.1, "pos_drop_rate": 0.05, "proj_drop_rate": 0.2, "attn_drop_rate": 0.3}


@pytest.mark.parametrize("more", [DROPS | {"drop_path_rate": 0.3}, {"patch_drop_rate": 0.5}], ids=["drop", "patches"])
def test_what_acts_in_training_alone_is_saved(more, tmp_path):
    model = pruned("plain", **more)
    again = assert_saved_as_it_is(tmp_path / "s", model)
    assert training_only(again) == training_only(model)
    assert [b.attn.attn_drop for b in again.blocks] == [b.attn.attn_drop for b in model.blocks]
    assert type(again.patch_drop) is type(model.patch_drop)
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    runs = [(torch.manual_seed(1), m.train()(x))[1] for m in (model, again)]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-5)
    assert model.training, "saving leaves the mode alone"


def test_drop_path_of_each_block_is_saved(tmp_path):
    model = pruned("plain")
    drop_path(model)
    found = training_only(assert_saved_as_it_is(tmp_path / "s", model))
    assert found == {"blocks.1.drop_path1": 0.1, "blocks.0.drop_path2": 0.2, "blocks.1.drop_path2": 0.2}


def test_labels_of_transformers_are_saved(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=16, patch_size=8
    )
    config.id2label = {0: "cat", 1: "dog", 2: "owl"}
    config.label2id = {"cat": 0, "dog": 1, "owl": 2}
    host = randomise_(transformers.ViTForImageClassification(config)).eval()
    model = adapters.find(host).prepare(host)
    again = assert_saved_as_it_is(tmp_path / "a", model)
    assert again.config.id2label == config.id2label and again.config.label2id == config.label2id
    model.config.id2label = {0: "tabby", 1: "poodle", 2: "barn owl"}
    again = assert_saved_as_it_is(tmp_path / "b", model)
    assert again.config.id2label == {0: "tabby", 1: "poodle", 2: "barn owl"}


def hook(model):
    model.blocks[0].register_forward_hook(lambda module, args, out: out * 1.01)


def other_forward(model):
    model.forward_head = lambda x, pre_logits=False: model.head(model.fc_norm(x.mean(1)))


def untrained_norm(model):
    model.norm = nn.LayerNorm(model.embed_dim)


REFUSED = {
    "a Sequential head": (
        lambda m: setattr(m, "head", nn.Sequential(nn.Linear(m.embed_dim, 9), nn.Tanh(), nn.Linear(9, 5))),
        r"^head: found Sequential of Linear, Tanh, Linear, .* has Linear there",
    ),
    "another norm": (untrained_norm, r"^norm: found LayerNorm, .* has Norm there"),
    "a parameter more": (
        lambda m: m.register_parameter("prompt", nn.Parameter(torch.zeros(4))),
        r"^prompt: found \(4,\), .* has nothing there",
    ),
    "a layer of its own": (
        attribute("blocks.1.mlp", "act", type("Square", (nn.ReLU,), {})()),
        r"^blocks\.1\.mlp\.act: f",
    ),
    "a hook": (hook, "computes something else: outputs are off by .* nothing was written"),
    "a forward": (other_forward, "computes something else"),
    "no more running": (lambda m: setattr(m, "head", nn.Linear(3, 5)), r"^head.weight: found \(5, 3\)|does not run"),
    "a stem": (lambda m: setattr(m.patch_embed, "proj", nn.Sequential(m.patch_embed.proj)), "a stem of Sequential"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_change_that_cannot_be_said_is_refused_by_name(change, tmp_path):
    make_change, says = REFUSED[change]
    model = pruned("plain")
    make_change(model)
    assert_refused(tmp_path / "s", model, says)


def test_a_masked_model_is_saved_as_its_compact_twin(tmp_path):
    model, _, masks = masked("plain")
    again = snapshot.load(snapshot.save(tmp_path / "s", model))
    assert again.embed_dim == int(masks["emb"].sum()) and model.embed_dim == 48
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=1e-5 * float(outputs(model).abs().max()))


def test_a_model_masked_by_other_means_is_refused(tmp_path):
    from nvit.layers import keep_

    model, groups, masks = masked("plain")
    model.masks = None
    assert_refused(tmp_path / "s", model, r"blocks\.0\.attn\.kept: found \(2, 10, 10\), .* has \(3, 16, 16\) there")
    keep_(model, random_masks(groups, 0.3, seed=9))
    model.masks = {name: keep.numpy().tobytes() for name, keep in masks.items()}
    assert_refused(tmp_path / "t", model, "computes something else|does not run")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("host", ["plain", "eva_rope_mixed", "beit_both", "swin_three_stages", "hf_dinov2_registers"])
def test_other_precisions_are_saved(host, dtype, tmp_path):
    model = pruned(host).to(dtype)
    again = snapshot.load(snapshot.save(tmp_path / "s", model))
    assert {p.dtype for p in again.parameters()} == {dtype}
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=1e-2 * float(outputs(model).abs().max()))


def test_a_weight_that_is_not_finite_does_not_hide_a_difference(tmp_path):
    model = pruned("plain")
    with torch.no_grad():
        model.head.bias[2] = float("nan")
    snapshot.save(tmp_path / "s", model)
    hook(model)
    with pytest.raises(ValueError, match="computes something else"):
        snapshot.save(tmp_path / "s", model)


def test_weights_that_do_not_read_back_are_not_kept(tmp_path, monkeypatch):
    """A disk that flips a bit: the old snapshot stays."""
    model = pruned("plain")
    snapshot.save(tmp_path / "s", model)
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    written = snapshot.save.__globals__["write_tensors"]

    def flipping(path, tensors):
        written(path, tensors)
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)

    monkeypatch.setitem(snapshot.save.__globals__, "write_tensors", flipping)
    with pytest.raises(OSError, match="does not read back as it was written"):
        snapshot.save(tmp_path / "s", model)
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


class Allocated(LiveBytes):
    """Of real tensors alone."""

    def _count(self, storage) -> None:
        if storage.device.type != "meta":
            super()._count(storage)


def test_verifying_takes_no_second_copy_of_the_weights():
    """A model of 43 MB whose two images are small: what is alive at once is a fraction of it."""
    model = make("plain", embed_dim=384, num_heads=6, depth=6, mlp_ratio=4.0)
    adapters.find(model).prepare(model)
    state, spec = model.state_dict(), snapshot.spec_of(model)
    weights = sum(t.numel() * t.element_size() for t in state.values())
    with Allocated(state.values()) as counted:
        verify.check_function(model, spec, state)
    assert weights > 4e7 and 0 < counted.peak < 0.05 * weights, f"{counted.peak} of {weights} bytes"


def test_compressed_weights_are_refused(tmp_path):
    model = make("plain", **TINY)
    adapters.find(model).prepare(model)
    model.head.weight = nn.Parameter(torch.zeros(7, 48, device="meta"))
    assert_refused(tmp_path / "s", model, "head.weight is a torch.float32 tensor on meta, which cannot be saved")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "drop_path_rate": 0.1}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1, "drop_rate": 0.1}),
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (1, 1)}),
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2, "drop_path_rate": 0.2}),
        ("vit_small_patch16_dinov3", {"img_size": 32, "depth": 1, "num_classes": 3}),
        ("beit_base_patch16_224", {"img_size": 32, "depth": 1, "proj_drop_rate": 0.1}),
    ],
)
def test_models_from_timms_factory_are_saved(name, more, tmp_path):
    model = randomise_(timm.create_model(name, **more)).eval()
    adapters.find(model).prepare(model)
    again = assert_saved_as_it_is(tmp_path / "s", model)
    assert training_only(again) == training_only(model)


def test_a_model_from_transformers_folder_is_saved(tmp_path):
    host = HOSTS["hf_dinov2_registers"]()
    host.save_pretrained(tmp_path / "hf")
    model = type(host).from_pretrained(tmp_path / "hf").eval()
    model.gradient_checkpointing_enable()
    adapters.find(model).prepare(model)
    again = snapshot.load(snapshot.save(tmp_path / "s", model))
    torch.testing.assert_close(outputs(again), outputs(host), rtol=0, atol=1e-5)
