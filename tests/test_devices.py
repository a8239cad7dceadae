"""The same list of jobs on a fake device and, marked `gpu`, on a real one: each runs where its model is, gives what the
CPU gives, and makes the host wait nowhere inside a step."""

from functools import cache

import pytest
import torch

from nvit.layers import functional
from tests import fake_device
from tests.device_jobs import JOBS, Place
from tests.fake_device import FAKE, FakeDevice
from tests.families import HOSTS, ONE_OF_EACH

MORE = [
    name
    for name in (
        "vit_attention_pooling",
        "eva_02_clip",
        "eva_dinov3",
        "swin_no_patch_norm",
        "beit_swiglu",
        "hf_deit_teacher",
    )
    if name in HOSTS
]
"""Where constants, pooling or tokens are others than in one of each family."""

CASES = [(host, job) for host in ONE_OF_EACH for job in JOBS]
CASES += [(host, job) for host in MORE for job in ("masked every", "scores hessian", "training hessian", "refit")]


@cache
def on_the_cpu(host: str, job: str):
    with functional.kernels(False):
        return JOBS[job](Place(host, torch.device("cpu"), folder=folder()))


def folder() -> str:
    import tempfile

    return tempfile.mkdtemp()


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
    found = JOBS[job](Place(host, torch.device("cuda", 0), fake_device.quiet_cuda, str(tmp_path)))
    assert_alike(found, on_the_cpu(host, job), 1e-2)
