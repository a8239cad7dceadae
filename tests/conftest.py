"""What all tests share: property tests without a clock or a stored database, no reach for the network or into the
user's cache, the long ones first, and what is costly made once for all processes that run them."""

import copy
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    """Tests marked `long` come first, so that no process ends with one alone; those marked `gpu` say why they do not
    run."""
    import torch

    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Latency tables and choices of kernels that no earlier run has measured and no other process writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def once(request, tmp_path_factory):
    """once(name, make): the folder `name`, filled by `make(folder)` in the first process of a run that asks."""
    base = tmp_path_factory.getbasetemp()
    # Each worker of xdist has a folder of its own in the one of the run.
    shared = base.parent if hasattr(request.config, "workerinput") else base

    def get(name, make):
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def torchlib_once():
    """torch reads its table of operations anew, seconds, at every conversion to ONNX; here once an opset."""
    from torch.onnx._internal.exporter import _registration

    made, tables = _registration.ONNXRegistry.from_torchlib, {}

    def once(opset_version):
        if opset_version not in tables:
            tables[opset_version] = made(opset_version)
        return copy.copy(tables[opset_version])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(once))
        yield
