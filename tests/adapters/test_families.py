"""What every family promises, on tiny models: nothing changes by preparing, masked equals compact equals the host with
explicit zeros, through the disk and in a new process; both routes to a gate gradient agree; runs meet their target."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nvit import LatencyTable, PruneConfig, adapters, prune, snapshot
from nvit.analysis.evaluate import macs
from nvit.criteria.base import Evidence
from nvit.criteria.gates import GateRecorder
from nvit.criteria.registry import CRITERIA
from nvit.spec import KINDS
from nvit.structure.compact import compact
from nvit.structure.masks import apply_, full_masks, kept_counts, weight_masks, widths
from tests.families import HOSTS
from tests.hosts import masks_for, random_masks
from tests.references import masked_host

ROOT = Path(__file__).parents[2]
RELOAD = """
import sys, torch, nvit
from pathlib import Path
from safetensors.torch import load_file, save_file
root, found = Path(sys.argv[1]), {}
with torch.inference_mode():
    for name, x in load_file(root / "images.safetensors").items():
        model = nvit.load(root / name)
        found[name] = torch.cat([t for t in nvit.adapters.find(model).logits(model, x) if t is not None], -1)
save_file({k: v.contiguous() for k, v in found.items()}, root / "logits.safetensors")
"""


def build(name: str, dtype: torch.dtype = torch.float64):
    """A prepared model, its groups and two images."""
    host = HOSTS[name]().to(dtype)
    size = adapters.preprocess(host)["input_size"]
    x = torch.randn(2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    model = adapters.find(host).prepare(host)
    return model, adapters.find(model).groups(model), x


def out(model, x, adapter=None) -> torch.Tensor:
    """Class logits, or both tokens' side by side."""
    with torch.no_grad():
        logits = (adapter or adapters.find(model)).logits(model, x)
    return torch.cat([t for t in logits if t is not None], -1)


def labels(model, x) -> torch.Tensor:
    """Class numbers as the model's task has them: an image's, or the same for all its pixels."""
    y, shape = torch.tensor([0, 2]), out(model, x).shape
    return y if len(shape) == 2 else y[:, None, None].expand(2, *shape[2:])


def exact_out(plain, groups, masks, x) -> torch.Tensor:
    """Of the host with explicit zeros; it is copied."""
    return out(masked_host(copy.deepcopy(plain), groups, masks), x, adapters.find(plain))


def assert_close(got, exact, scale=1e-10):
    torch.testing.assert_close(got, exact, rtol=0, atol=scale * max(1.0, float(exact.abs().max())))


@pytest.mark.parametrize("name", HOSTS)
def test_prepare_changes_no_output_and_no_name(name):
    plain = HOSTS[name]().double()
    model, _, x = build(name)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_close(out(model, x), out(plain, x), 1e-12)
    adapter = adapters.find(model)
    assert adapter is adapters.find(plain) and adapter.prepare(model) is model


@pytest.mark.parametrize("name", HOSTS)
def test_groups_cover_every_width_once(name):
    model, groups, _ = build(name)
    assert len({g.name for g in groups}) == len(groups)
    params = dict(model.named_parameters())
    for g in groups:
        assert g.kind in KINDS and g.slices and g.scored_slices, g.name
        for s in g.slices:
            assert s.of(params[s.name]).shape[s.axis] == g.size, f"{g.name}: {s}"
    blocks = widths(groups, full_masks(groups))
    per_block = [(b, g.kind) for g in groups for b in g.blocks]
    assert sorted(per_block) == sorted((b, kind) for b in range(len(blocks)) for kind in KINDS)


@pytest.mark.parametrize("name", HOSTS)
def test_masked_equals_compact_equals_the_host_with_zeros(name):
    plain = HOSTS[name]().double()

    @settings(max_examples=4)
    @given(st.data())
    def check(data):
        model, groups, x = build(name)
        masks = data.draw(masks_for(groups))
        exact = exact_out(plain, groups, masks, x)
        apply_(model, groups, masks)
        assert_close(out(model, x), exact)
        assert_close(out(compact(model, groups, masks), x), exact)

    check()


def test_masked_equals_compact_after_reload_in_a_new_process(tmp_path):
    """fp32, through the disk, one child process for all families; masks of other fractions from one to the next."""
    inputs, expected = {}, {}
    for seed, name in enumerate(HOSTS):
        model, groups, x = build(name, torch.float32)
        masks = random_masks(groups, 0.4 + 0.2 * (seed % 3), seed)
        apply_(model, groups, masks)
        inputs[name], expected[name] = x, out(model, x)
        snapshot.save(tmp_path / name, compact(model, groups, masks))
    save_file(inputs, tmp_path / "images.safetensors")
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, timeout=400, cwd=ROOT)
    reloaded = load_file(tmp_path / "logits.safetensors")
    for key, logits in expected.items():
        worst = float((reloaded[key] - logits).abs().max())
        assert worst <= 1e-5 * float(logits.abs().max()), f"{key}: {worst:.2e} of {float(logits.abs().max()):.2e}"


@pytest.mark.parametrize("name", HOSTS)
def test_compact_can_be_pruned_again(name, tmp_path):
    plain = HOSTS[name]().double()
    model, groups, x = build(name)
    first = random_masks(groups, 0.7)
    small = compact(model, groups, first)
    again = adapters.find(small).groups(small)
    assert {g.name: g.size for g in again} == kept_counts(first)
    second = random_masks(again, 0.6, seed=9)
    both = {n: keep.clone().index_put_((keep.nonzero()[:, 0],), second[n]) for n, keep in first.items()}
    exact = exact_out(plain, groups, both, x)
    assert_close(out(compact(small, again, second), x), exact)
    apply_(small, again, second)
    assert_close(out(small, x), exact)
    path = snapshot.save(Path(tmp_path) / "s", compact(small, again, second).float())
    assert_close(out(snapshot.load(path), x.float()), exact.float(), 1e-5)


@pytest.mark.parametrize("name", HOSTS)
def test_activations_route_equals_weights_route(name):
    model, groups, x = build(name)
    masks = random_masks(groups, 0.6)
    apply_(model, groups, masks)
    y = labels(model, x)

    def loss():
        return sum(F.cross_entropy(t, y) for t in adapters.find(model).logits(model, x) if t is not None)

    loss().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = CRITERIA["hessian"].score(groups, Evidence(dict(model.named_parameters()), grads))
    model.requires_grad_(False)
    with GateRecorder(model, groups, masks) as gates:
        loss().backward()
    found = gates.pop()
    for g in groups:
        assert found[g.name].shape == (len(x), g.size)
        atol = 1e-9 * float(expected[g.name].max())
        torch.testing.assert_close(found[g.name].sum(0).square(), expected[g.name], rtol=1e-8, atol=atol, msg=g.name)


@pytest.mark.parametrize("name", HOSTS)
def test_analytic_table_is_the_flop_counter(name):
    """Random masks, exact: MACs are multilinear in the widths."""
    model, groups, x = build(name, torch.float32)
    table = LatencyTable.analytic(model, dict.fromkeys(KINDS, 1))
    for seed in range(3):
        masks = random_masks(groups, 0.3 + 0.2 * seed, seed)
        counted = macs(compact(model, groups, masks), tuple(x.shape[1:]))
        assert table.model_ms(widths(groups, masks)) * 1e9 == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize("name", HOSTS)
def test_one_shot_meets_its_target_and_reloads(name, tmp_path):
    model, _, x = build(name, torch.float32)
    bundles = {"bundle_heads": 1, "bundle_emb": 8, "bundle_qk": 2, "bundle_v": 2, "bundle_mlp": 4}
    config = PruneConfig(latency_target=0.7, train=False, score_batches=1, batch_size=2, **bundles)
    table = LatencyTable.analytic(model, config.bundle_sizes)
    result = prune(model, [(x, torch.tensor([0, 2]))], config, table)
    assert result.snapshots[0].predicted_ratio <= 0.7
    assert_close(out(snapshot.load(result.save(tmp_path / "s")), x), out(model, x), 1e-5)


@pytest.mark.parametrize("name", HOSTS)
def test_a_refit_brings_every_family_nearer_to_the_dense_model(name):
    """Its own measure: squared error of every layer on images held back, none of which may grow."""
    model, groups, x = build(name, torch.float32)
    bundles = {"bundle_heads": 1, "bundle_emb": 8, "bundle_qk": 2, "bundle_v": 2, "bundle_mlp": 4}
    config = PruneConfig(latency_target=0.7, train=False, refit=True, cost="predicted", batch_size=4, **bundles)
    table = LatencyTable.analytic(model, config.bundle_sizes)
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, *x.shape[1:], generator=g), torch.zeros(4, dtype=torch.long)) for _ in range(5)]
    result = prune(model, batches, config, table)
    assert result.snapshots[0].predicted_ratio <= 0.7 and result.history[-1]["refit_error"] < 1
    assert_close(out(result.model, x), out(model.eval(), x), 1e-5)
    params = dict(model.named_parameters())
    for name, dims in weight_masks(params, groups, result.masks).items():
        for d, keep in enumerate(dims):
            if keep is not None:
                assert not params[name].index_select(d, (~keep).nonzero().squeeze(1)).any(), f"{name} came back"


@pytest.mark.parametrize("name", HOSTS)
def test_training_prunes_with_finite_gradients(name):
    model, _, x = build(name, torch.float32)
    more = {"bundle_heads": 1, "interval": 1, "batch_size": 2, "lr": 1e-3, "distill_weight": 1.0}
    config = PruneConfig(latency_target=0.9, bundles_per_step=4, **more)
    table = LatencyTable.analytic(model, config.bundle_sizes)
    result = prune(model, [(x, labels(model, x))], config, table)
    assert_close(out(result.model, x), out(model.eval(), x), 1e-5)
