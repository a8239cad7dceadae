"""All group sums of a whole model beside torch's reductions, layer by layer and multi-tensor.

python -m benchmarks.kernels.group_dot
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.harness import OURS, Case, device, run
from benchmarks.kernels.calls import compiled, fused_only
from nvit_kernels import functional, reference
from nvit_kernels.ops.group_dot.plan import DotSlice, GroupDotPlan

MODELS = {"deit_base": (12, 12, 768), "deit_tiny": (12, 3, 192)}  # blocks, heads, width


def plan_of(blocks: int, heads: int, width: int) -> tuple[GroupDotPlan, dict[str, tuple[int, ...]]]:
    """Every group of a DeiT: heads, qk and v dims, hidden units by block, and the stream's channels."""
    shapes, slices, end, dim, hidden = {}, [], width, width // heads, 4 * width
    for i in range(blocks):
        names = {kind: f"blocks.{i}.{kind}" for kind in ("qkv", "proj", "fc1", "fc2")}
        shapes |= {f"{names['qkv']}.weight": (3 * width, width), f"{names['qkv']}.bias": (3 * width,),
                   f"{names['proj']}.weight": (width, width), f"{names['fc1']}.weight": (hidden, width),
                   f"{names['fc1']}.bias": (hidden,), f"{names['fc2']}.weight": (width, hidden)}  # fmt: skip
        head, qk, v, mlp = end, end + heads, end + heads + dim, end + heads + 2 * dim
        end = mlp + hidden
        for part, dims in ((0, qk), (1, qk), (2, v)):
            rows = (width * part, width * (part + 1))
            slices += [DotSlice(f"{names['qkv']}.weight", *rows, (heads, dim, width), 0, head),
                       DotSlice(f"{names['qkv']}.weight", *rows, (heads, dim, width), 1, dims),
                       DotSlice(f"{names['qkv']}.bias", *rows, (heads, dim), 1, dims)]  # fmt: skip
        slices += [DotSlice(f"{names['proj']}.weight", 0, None, (width, heads, dim), 1, head),
                   DotSlice(f"{names['fc1']}.weight", 0, None, (hidden, width), 0, mlp),
                   DotSlice(f"{names['fc1']}.bias", 0, None, (hidden,), 0, mlp),
                   DotSlice(f"{names['fc2']}.weight", 0, None, (width, hidden), 1, mlp)]  # fmt: skip
        slices += [DotSlice(f"{names[kind]}.weight", 0, None, (rows, width), 1, 0)
                   for kind, rows in (("qkv", 3 * width), ("fc1", hidden))]  # fmt: skip
        slices += [DotSlice(f"{names['proj']}.weight", 0, None, (width, width), 0, 0),
                   DotSlice(f"{names['fc2']}.weight", 0, None, (width, hidden), 0, 0)]  # fmt: skip
    return GroupDotPlan(slices, shapes), shapes


def foreach(params, grads, plan):
    """One multi-tensor product, then a sum per slice."""
    products = dict(zip(plan.names, torch._foreach_mul([params[n] for n in plan.names], [grads[n] for n in plan.names]),
                        strict=True))  # fmt: skip
    out = torch.zeros(plan.outputs, device=products[plan.names[0]].device)
    for s in plan.slices:
        dims = [d for d in range(len(s.view)) if d != s.axis]
        part = products[s.name][s.start : s.stop].reshape(s.view)
        out[s.offset : s.offset + s.units] += part.sum(dims) if dims else part
    return out


def cases() -> list[Case]:
    there = device()
    made = []
    for name in ("deit_base", "deit_tiny") if there.type == "cuda" else ("deit_tiny",):
        plan, shapes = plan_of(*MODELS[name])
        params, grads = ({n: torch.randn(s, device=there) for n, s in shapes.items()} for _ in range(2))
        providers = {
            OURS: lambda p=params, g=grads, plan=plan: fused_only(lambda: functional.group_dot(p, g, plan)),
            "torch: mul and sum a slice": lambda p=params, g=grads, plan=plan: reference.group_dot(p, g, plan),
            "torch: _foreach_mul, sum a slice": lambda p=params, g=grads, plan=plan: foreach(p, g, plan),
        }
        doubles = [{n: t.double() for n, t in ts.items()} for ts in (params, grads)]
        exact = lambda d=doubles, plan=plan: reference.group_dot(*d, plan)  # noqa: E731
        size = 2 * sum(t.nbytes for t in params.values())
        made.append(Case(f"group_dot all of {name}", providers, exact, error=1e-4, bytes=size))
        # A case of its own: hundreds of sums in one graph take long to compile, and what is above is kept by then.
        whole = {"torch.compile of _foreach_mul, sum a slice": partial(compiled(foreach), params, grads, plan)}
        made.append(Case(f"group_dot all of {name}, compiled", providers | whole, exact, 1e-4, size))
    return made


if __name__ == "__main__":
    run(cases())
