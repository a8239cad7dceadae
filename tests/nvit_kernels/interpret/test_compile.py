"""torch.compile of a fused block: one graph, and the same one for every mask."""

import pytest
import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import Block
from torch._dynamo.testing import CompileCounterWithBackend

from nvit_kernels import collect_scores_, fuse, keep_
from nvit_kernels.hosts.fuse import groups

SIZES = {"emb": 24, "heads": 3, "qk_dim": 8, "v_dim": 8, "mlp": 96}


def some(shift):
    return {name: torch.arange(size) % 3 != shift for name, size in SIZES.items()}


@pytest.mark.parametrize(("mlp", "scoring"), [({}, True), (dict(mlp_layer=SwiGLU, act_layer=torch.nn.SiLU), False)])
def test_masks_change_and_nothing_recompiles(mlp, scoring):
    torch._dynamo.reset()
    block = fuse(Block(24, 3, qkv_bias=True, **mlp), some(0))
    assert set(groups(block)) == set(SIZES)
    scores = collect_scores_(block, 2 if scoring else 0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)

    def step(model, x):
        for buffer in scores.values():
            buffer.zero_()
        x = x.clone().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        return y.detach(), x.grad, *(buffer.clone() for buffer in scores.values())

    x = torch.randn(2, 17, 24)
    for shift in range(3):
        keep_(block, some(shift))
        expected, got = step(block, x), step(compiled, x)
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a)
        assert counter.frame_count == 1, f"{counter.frame_count - 1} recompilations"
    assert not scoring or all(buffer.abs().max() > 0 for buffer in scores.values())


def test_changing_masks_allocates_no_list():
    block = fuse(Block(24, 3), some(0))
    places = [t.data_ptr() for t in block.buffers()]
    keep_(block, some(1))
    assert places == [t.data_ptr() for t in block.buffers()] and len(places) == 3 * (2 + 3 + 1)
