"""A model run block by block: it ends where the whole one does, and what is settled runs no more."""

import pytest
import torch

from nvit.calibration.replay import Replay
from tests.hosts import images, prepared


@pytest.mark.parametrize("host", ["plain", "deit_distilled", "registers", "swiglu", "dynamic_size", "no_classifier"])
def test_replay_ends_where_the_model_does(host):
    model, _ = prepared(host)
    replay = Replay(model)
    xs = [images(model, 6, seed=0), images(model, 6, seed=1), images(model, 2, seed=9)]
    with torch.no_grad():
        for x in xs:
            replay.enter(x)
        for _ in replay.blocks:
            replay.advance()
        outs = [replay.adapter.logits(model, x) for x in xs]
    got, whole = (
        torch.cat([torch.cat([t for t in out if t is not None], -1) for out in found])
        for found in ([args for args, _ in replay.inputs], outs)
    )
    torch.testing.assert_close(got, whole, rtol=0, atol=0)


def test_a_settled_layer_gives_what_it_gave_and_runs_no_more():
    model, _ = prepared("plain")
    replay, block, ran = Replay(model), model.blocks[1], []
    with torch.no_grad():
        for x in (images(model, 2), images(model, 3, seed=9)):
            replay.enter(x)
        replay.advance()
        before = [replay.run(b) for b in range(2)]
        block.attn.register_forward_hook(lambda *_: ran.append(1))
        replay.settle(block.mlp, [block.attn])
        assert not ran, "what may change runs first, so nothing is settled"
        replay.settle(block.attn, [block.mlp])
        assert len(ran) == 2
        block.attn.proj.weight.mul_(2)
        for b, exact in enumerate(before):
            torch.testing.assert_close(replay.run(b), exact, rtol=0, atol=0)
        block.mlp.fc2.weight.mul_(2)
        assert not torch.equal(replay.run(0), before[0]) and len(ran) == 2
        replay.advance()
        assert len(ran) == 2 and block.attn in block.modules()
        replay = Replay(model)
        replay.enter(images(model, 2))
        replay.advance()
        replay.advance()
    assert len(ran) == 3
