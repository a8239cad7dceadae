"""The same list of jobs on a fake device and, marked `gpu`, on a real one: each runs where its model is, gives what the
CPU gives, and makes the host wait nowhere inside a step."""

import tempfile
from contextlib import nullcontext
from functools import cache

import pytest
import torch

from nvit.layers import functional
from nvit.utils.devices import sent
from tests import fake_device
from tests.device_jobs import JOBS, Found, Place
from tests.fake_device import FAKE, FakeDevice
from tests.families import HOSTS, ONE_OF_EACH

EVERYWHERE = [
    *("dense", "compact", "snapshot", "merged", "shortened", "decision", "capture", "one shot refitted"),
    *(job for job in JOBS if job.startswith("masked ")),
    *("scores hessian", "scores fisher", "scores curvature", "training hessian"),
]
"""Jobs of every family; the others differ in what is asked of the same layers."""

MORE = ("vit_attention_pooling", "eva_02_clip", "eva_dinov3", "swin_no_patch_norm", "beit_swiglu", "hf_deit_teacher")
"""Where constants, pooling or tokens are others than in one of each family."""

CASES = [(host, job) for host in ONE_OF_EACH for job in (JOBS if host == ONE_OF_EACH[0] else EVERYWHERE)]
CASES += [(host, job) for host in MORE if host in HOSTS for job in ("masked every", "training hessian")]


@cache
def on_the_cpu(host: str, job: str) -> Found:
    with functional.kernels(False), tempfile.TemporaryDirectory() as folder:
        return JOBS[job](Place(host, torch.device("cpu"), folder=folder))


def assert_alike(found, expected, scale):
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        got, most = found[name].cpu().double(), max(1e-12, float(exact.abs().max()))
        torch.testing.assert_close(got, exact.double(), rtol=0, atol=scale * most, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("host", "job"), CASES)
def test_on_a_fake_device(host, job, tmp_path, monkeypatch):
    fake_device.known_to_torch(monkeypatch)
    expected = on_the_cpu(host, job)
    with FakeDevice() as there:
        found = JOBS[job](Place(host, FAKE, there.quiet, str(tmp_path)))
        assert_alike(found, expected, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("host", "job"), CASES)
def test_on_a_gpu(host, job, tmp_path):
    with functional.kernels(False):
        found = JOBS[job](Place(host, torch.device("cuda", 0), fake_device.quiet_cuda, str(tmp_path)))
        assert_alike(found, on_the_cpu(host, job), 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "job",
    [
        *("masked every", "merged", "shortened", "scores hessian", "scores nvit", "training hessian"),
        *("one shot refitted", "one shot merged"),
    ],
)
def test_on_a_gpu_with_kernels(job, tmp_path):
    """Where a kernel is met first, its choice is measured, which waits."""
    host = ONE_OF_EACH[0]
    found = JOBS[job](Place(host, torch.device("cuda", 0), folder=str(tmp_path)))
    assert_alike(found, on_the_cpu(host, job), 1e-2)


def with_a_bad_batch(criterion: str, device: torch.device, quiet=nullcontext) -> None:
    """The second of three batches holds what is no number."""
    place = Place(ONE_OF_EACH[0], device)
    pruner = place.pruner(train=False, criterion=criterion)
    for batch in range(3):
        images, labels = place.images(batch), place.labels(batch)
        images = images * float("nan") if batch == 1 else images
        with quiet():
            pruner.score(images, labels)
    pruner.scores()


NAMED = [("hessian", r"the loss is nan on scoring batch 2;"), ("remaining", r"not finite on calibration batch 2;")]


@pytest.mark.parametrize(("criterion", "said"), NAMED)
def test_a_bad_batch_is_named_when_somebody_looks(criterion, said, monkeypatch):
    fake_device.known_to_torch(monkeypatch)
    with FakeDevice() as there, pytest.raises(FloatingPointError, match=said):
        with_a_bad_batch(criterion, FAKE, there.quiet)
    with pytest.raises(FloatingPointError, match=said):
        with_a_bad_batch(criterion, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize(("criterion", "said"), NAMED)
def test_a_bad_batch_is_named_on_a_gpu(criterion, said):
    with pytest.raises(FloatingPointError, match=said):
        with_a_bad_batch(criterion, torch.device("cuda", 0), fake_device.quiet_cuda)


def test_a_batch_of_the_cpu_is_sent_without_waiting():
    with FakeDevice() as there, there.quiet():
        assert sent(torch.ones(3), FAKE).device == FAKE


WAITING = {
    "a number": lambda t: float(t.sum()),
    "a copy": lambda t: t.cpu(),
    "a mask": lambda t: t[t > 0],
    "writing by a mask": lambda t: t.__setitem__(t > 0, t[:2].clone()),
    "an index of the CPU": lambda t: t[torch.tensor([1, 0])],
    "a tensor that is sent": lambda t: torch.ones(2).to(FAKE),
    "a constant": lambda t: torch.tensor([1.0, 2.0], device=FAKE),
    "a draw": lambda t: t.abs().multinomial(1),
}


@pytest.mark.parametrize("what", WAITING)
def test_the_fake_device_notices(what):
    with FakeDevice() as there:
        t = torch.tensor([1.0, 2.0, -1.0], device=FAKE)
        WAITING[what](t)
        with there.quiet(), pytest.raises(fake_device.Waits):
            WAITING[what](t)


def test_the_fake_device_mixes_no_devices_and_computes():
    with FakeDevice():
        t = torch.tensor([1.0, 2.0], device=FAKE, requires_grad=True)
        (t * 2 + 1).square().sum().backward()
        assert t.grad.cpu().tolist() == [12.0, 20.0]
        with pytest.raises(RuntimeError, match=r"two devices: \(2,\) on the GPU, \(2,\) on the CPU"):
            t + torch.ones(2)
