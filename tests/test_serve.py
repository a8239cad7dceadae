"""Serving: any number of images in batches of one size; on a GPU by replaying a graph."""

import pytest
import torch
from torch import nn

import nvit
from nvit import serve
from nvit.layers import choice
from nvit.serve import FixedBatch, graphed
from tests.families import HOSTS
from tests.hosts import images, make, prepared

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Batches(nn.Module):
    """Notes the batches it is called with, and returns each image's sum."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.clone())
        return x.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 11])
def test_every_call_is_of_one_size_and_the_last_is_padded_with_zeros(count):
    model = Batches()
    fixed = FixedBatch(model, torch.full((4, 1, 2, 2), torch.nan))
    x = torch.randn(count, 1, 2, 2)
    got = fixed(x)
    assert torch.equal(got, x.flatten(1).sum(1, keepdim=True))
    assert all(b.shape == (4, 1, 2, 2) for b in model.seen) and len(model.seen) == max(1, -(-count // 4))
    together = torch.cat(model.seen)
    assert torch.equal(together[:count], x) and not together[count:].any()


@pytest.mark.parametrize("host", ["deit_distilled", "registers"])
def test_on_a_cpu_it_is_the_model(host):
    model, x = make(host), images(make(host), 7)
    served = graphed(model, 3)
    with torch.no_grad():
        torch.testing.assert_close(served(x), model(x))
    assert not served(x).requires_grad
    what = f"{type(model).__name__}, 3 images of 3 × 16 × 16, float32"
    assert repr(served) == f"Graphed({what}; plain calls: there are no CUDA graphs on cpu)"


def test_images_come_in_any_dtype_and_logits_in_the_models():
    model = make("plain").to(torch.bfloat16)
    x = images(make("plain"), 2)
    assert torch.equal(graphed(model, 2)(x), model(x.bfloat16()).detach())


@pytest.mark.skipif("hf_vit" not in HOSTS, reason="transformers is missing")
def test_a_model_that_hands_its_logits_out_in_an_object_gives_them_plain():
    model, x = HOSTS["hf_vit"](), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(nvit.graphed(model, 2)(x), model(x).logits)


def test_what_cannot_be_served_is_refused_in_one_line():
    model = make("plain")
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        graphed(model, 0)
    with pytest.raises(
        ValueError, match="images are 3 × 8 × 8, this model was made ready for 3 × 16 × 16; resize them"
    ):
        graphed(model, 2)(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"training mode; call model\.eval\(\)"):
        graphed(model.train(), 2)
    with pytest.raises(ValueError, match="Supported families"):
        graphed(nn.Linear(2, 2).eval(), 2)


def test_the_package_chooses_between_kernels_and_torch_and_keeps_it_beside_latency_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("NVIT_CACHE", str(tmp_path))
    made = choice.used()
    assert made is not None and made.kind == "cuda"
    file = made.file_of(torch.device("cpu"))
    assert file.parent == tmp_path / "kernels" and "torch" in file.name and file.suffix == ".json"
    assert nvit.latency.table.default_cache() == tmp_path / "latency"


def test_describe_says_what_was_chosen_on_each_gpu(monkeypatch, tmp_path):
    made = choice.Choices(lambda *_: [1.0, 2.0], lambda device: tmp_path / "gpu.json")
    made.known[torch.device("cuda", 0)] = {"mlp bfloat16 64x197x768": {"kernel": 0.3, "torch": 0.2}}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with choice.using(made):
        assert serve.describe_choices()[0] == "mlp: kernel faster on 0 of 1 shapes, torch / kernel 0.67 to 0.67"
        assert "kernel or torch, mlp: kernel faster on 0 of 1" in nvit.describe()


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_replay_is_the_model_and_results_stay(dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("NVIT_CACHE", str(tmp_path))
    model, _ = prepared("deit_distilled")
    model = model.to("cuda", dtype).eval()
    served, x = graphed(model, 4), images(make("deit_distilled"), 11)
    assert "replays a CUDA graph" in repr(served)
    first = served(x)
    kept = first.clone()
    with torch.no_grad():
        expected = model(x.to("cuda", dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(first, expected, rtol=tolerance, atol=tolerance)
    served(torch.randn_like(x))
    assert torch.equal(first, kept), "a later call overwrote what an earlier one returned"


@pytest.mark.gpu
@cuda
def test_on_a_gpu_both_ways_of_an_op_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("NVIT_CACHE", str(tmp_path))
    made = choice.Choices(serve._device_ms, serve._kept_choices)
    model, _ = prepared("plain", embed_dim=64, num_heads=2)
    model, x = model.cuda().eval(), images(make("plain"), 4).cuda()
    with torch.no_grad(), choice.using(made):
        expected = model(x)
        known = {name: dict(times) for name, times in made.of(x.device).items()}
        torch.testing.assert_close(model(x), expected)
        assert made.of(x.device) == known
    assert {name.split()[0] for name in known} == {"layer_norm", "attention", "mlp"}
    assert all(0 < ms < 100 for times in known.values() for ms in times.values())
    assert len(list((tmp_path / "kernels").iterdir())) == 1
