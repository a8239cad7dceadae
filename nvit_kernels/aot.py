"""Compile every kernel ahead of time for an architecture, with no GPU, and read what it needs of one.

Not under the interpreter, where `@triton.jit` yields functions that cannot be compiled.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nvit_kernels import configs
from nvit_kernels.launch import FUSED_MULTIPLY_ADD
from nvit_kernels.ops import fold
from nvit_kernels.ops.attention import backward_kernels as attention_backward
from nvit_kernels.ops.attention import kernels as attention
from nvit_kernels.ops.attention.op import score_rows
from nvit_kernels.ops.group_dot import kernels as group_dot
from nvit_kernels.ops.group_dot.plan import FEW, LONG, MANY, SHORT
from nvit_kernels.ops.kept_layer_norm import kernels as kept_layer_norm
from nvit_kernels.ops.kept_layer_norm.op import BACKWARD_TILE, blocks
from nvit_kernels.ops.matmul import kernels as matmul
from nvit_kernels.ops.matmul.op import ROWS
from nvit_kernels.ops.merge_tokens import kernels as merge_tokens
from nvit_kernels.ops.merge_tokens.op import FEW_ROWS as FEW_MERGED
from nvit_kernels.ops.merge_tokens.op import KEYS_TILE as MERGED_KEYS
from nvit_kernels.ops.merge_tokens.op import MEANS_TILE as MERGED_MEANS
from nvit_kernels.ops.merge_tokens.op import ROWS as MERGED
from nvit_kernels.ops.merge_tokens.op import match_tile
from nvit_kernels.ops.mlp import kernels as mlp_kernels
from nvit_kernels.ops.mlp import whole as mlp
from nvit_kernels.ops.swiglu import kernels as swiglu_kernels

ARCHS = (80, 86, 89, 90, 100)
INT64_POINTERS = {"pointers", "tiles", "reductions", "outputs", "contributions", "place"}
INT32_POINTERS = {"index", "count", "heads", "heads_n", "stays", "following"}
MASKS = {"mask", "qk_mask", "v_mask"}
FLOAT_POINTERS = {"stats", "delta", "v_part", "qk_part", "bias_part", "part", "mean", "rstd", "workspace", "sums",
                  "scores", "unit"}  # fmt: skip
FLOATS = {"scale", "scale_log2", "eps"}
TENSORS = {"q", "k", "v", "o", "do", "dq", "dk", "dv", "bias", "window",  # attention
           "x", "w", "b", "y", "residual", "total", "dx", "dy", "dtotal",  # LayerNorm
           "a", "out", "out2", "aux", "aux2", "u", "da", "du",  # MLP
           "keys",  # merging tokens
           "gate", "value", "dgate", "dvalue", "b_gate", "b_value"}  # fmt: skip
KINDS = (
    (INT64_POINTERS, "*i64"),
    (INT32_POINTERS, "*i32"),
    (MASKS, "*i1"),
    (FLOAT_POINTERS, "*fp32"),
    (FLOATS, "fp32"),
    (TENSORS, "*fp16"),
)  # argument names -> their type, 16-bit tensors as fp16


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: its constants, and the name of its configs where it is autotuned.

    A constant of None is an optional pointer that is not given.
    """

    name: str
    kernel: object
    constants: dict
    tuned: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()  # argument types other than their names say
    warps: int = 4

    def configs(self, arch: int) -> list[triton.Config]:
        """The configs that run on `arch`; for a kernel that is not tuned, its only one."""
        if self.tuned is None:
            return [triton.Config({}, num_warps=self.warps, num_stages=2)]
        return configs.fitting(self.tuned, arch, {**signature(self), **self.constants})


@dataclass(frozen=True)
class Report:
    """What one compiled kernel takes of a GPU.

    Attributes:
        registers: of a thread.
        spills: bytes of stack a thread.
        shared: bytes a block.
        loop_spills: instructions inside loops that store or load what was spilled. A value that waits on the stack
            while a loop runs costs next to nothing; one that moves in the loop costs each time round.
    """

    case: str
    arch: int
    config: str
    registers: int
    spills: int
    shared: int
    cubin_bytes: int
    loop_spills: int = 0


def absent(*names: str) -> dict[str, None]:
    """Optional arguments that a case does without."""
    return dict.fromkeys(names)


def attention_cases(qk: int, v: int, kept: bool, added: bool = False) -> Iterator[Case]:
    """Attention at these head widths; with kept lists; with a float32 bias and a 16-bit window mask."""
    shape = dict(PRECISION="ieee", BLOCK_QK=qk, BLOCK_V=v)
    shape |= {} if kept else absent("heads", "heads_n", "qk_mask", "v_mask")
    shape |= {} if added else absent("bias", "window", "windows")
    tag, kinds = f"{qk}x{v}{' kept' if kept else ''}{' bias' if added else ''}", (("bias", "*fp32"),)
    dq = shape | dict(BLOCK_M=score_rows(max(qk, v)))
    yield Case(f"attention forward {tag}", attention.forward_kernel, shape, "attention_forward", kinds)
    yield Case(f"attention dkv {tag}", attention_backward.dkv_kernel, shape, "attention_dkv", kinds)
    yield Case(f"attention dq {tag}", attention_backward.dq_kernel, dq, "attention_dq", kinds)
    if added:
        yield Case(f"attention dbias {tag}", attention_backward.dbias_kernel, shape, "attention_dbias", kinds)


def matmul_cases() -> Iterator[Case]:
    """Each role of the products, on the side that its list is for."""
    outs = {"linear": ("out2", "aux", "aux2"), "gelu": ("aux", "aux2"), "swiglu": ("aux2",),
            "gelu_backward": ("out2", "aux2"), "swiglu_backward": ()}  # fmt: skip
    for listed, (role, b_by, kept, gather, bias) in itertools.product((True, False), (
        ("gelu", "n", "n", True, True), ("swiglu", "n", "n", True, True), ("linear", "n", "n", True, True),
        ("linear", "n", "k", False, True), ("linear", "k", "k", True, False),
        ("gelu_backward", "k", "n", False, False), ("swiglu_backward", "k", "n", False, False),
    )):  # fmt: skip
        if "swiglu" in role and not listed:
            continue  # the list takes nothing that gelu does not show
        backward = "backward" in role
        constants = dict(ROLE=role, B_BY=b_by, KEPT=kept, GATHER=gather, PRECISION="ieee", BLOCK_M=ROWS)
        constants |= absent(*outs[role], *(() if bias else ("bias",)), *(() if backward else ("part",)))
        constants |= {} if listed else absent("index", "count")
        yield Case(f"tokens {role} b by {b_by}, {'' if listed else 'all '}kept {kept}", matmul.tokens_kernel, constants,
                   "tokens_backward" if backward else "tokens", (("bias", "*fp16"),))  # fmt: skip
    for listed, kept in itertools.product((True, False), "mn"):
        constants = dict(KEPT=kept, PRECISION="ieee", **({} if listed else absent("index", "count")))
        yield Case(
            f"weights {'' if listed else 'all '}kept {kept}",
            matmul.weights_kernel,
            constants,
            "weights",
            (("sums", "*fp16"),),
        )
    yield Case("compact", matmul.compact_kernel, dict(ROWS=8, BLOCK=256))
    yield Case("scores", matmul.scores_kernel, dict(ROWS=ROWS, BLOCK=128))


def mlp_cases() -> Iterator[Case]:
    """The passes around the vendor's products, over all units and over kept ones, and with odd widths."""
    for mask, unit in ((False, 8), (True, 8), (True, 1)):
        tag = f"{' kept' if mask else ''}{' odd width' if unit == 1 else ''}"
        shared = dict(UNIT=unit, BLOCK_N=mlp.COLUMNS, **({} if mask else absent("mask")))
        for op, module, forward, backward, planes in (
            ("gelu", mlp_kernels, "gelu_kernel", "gelu_backward_kernel", 2),
            ("swiglu", swiglu_kernels, "gated_kernel", "gated_backward_kernel", 3),
        ):
            rows = mlp.backward_rows(planes)
            yield Case(f"{op} pass{tag}", getattr(module, forward), shared | dict(BLOCK_M=mlp.FORWARD_ROWS))
            yield Case(f"{op} backward pass{tag}", getattr(module, backward),
                       shared | dict(BLOCK_M=rows, CHUNK=mlp.LONGEST_CHUNK))  # fmt: skip


def layer_norm_cases(width: int, kept: bool) -> Iterator[Case]:
    """LayerNorm with a residual, all of it or over kept channels."""
    lists, tag = {} if kept else absent("mask", "count"), f"{width}{' kept' if kept else ''}"
    for name, kernel, more, size in (
        ("forward", kept_layer_norm.forward_kernel, {}, blocks(width)),
        ("backward", kept_layer_norm.backward_kernel, dict(CHUNK=32, STAGES=3), blocks(width, BACKWARD_TILE)),
    ):
        constants = {"UNIT": 8, **more, **lists, **{k: v for k, v in size.items() if k.startswith("BLOCK")}}
        yield Case(f"layer norm {name} {tag}", kernel, constants, warps=size["num_warps"])


def merge_cases() -> Iterator[Case]:
    """Merging tokens behind a class token, with sizes; the gradient of the tokens, and of both."""
    floats = tuple((name, "*fp32") for name in ("sizes", "total", "dsizes", "dtotal"))
    for kind in ("*fp16", "*fp32"):
        constants = MERGED_KEYS | dict(BLOCK_D=64)
        yield Case(f"merge tokens keys{' fp32' * (kind == '*fp32')}", merge_tokens.keys_kernel, constants,
                   overrides=(("keys", kind),))  # fmt: skip
    for tokens in (50, 197):
        tile = match_tile(tokens, 1, 64)
        constants = {k: v for k, v in tile.items() if k.startswith("BLOCK")}
        yield Case(f"merge tokens match {tokens}", merge_tokens.match_kernel, constants, overrides=floats,
                   warps=tile["num_warps"])  # fmt: skip
    for sized in (True, False):
        constants = MERGED_MEANS | ({} if sized else absent("sizes"))
        yield Case(f"merge tokens means{' sizes' * sized}", merge_tokens.means_kernel, constants, overrides=floats)
        lists = {} if sized else absent("dtotal", "x", "sizes", "dsizes")
        constants = dict(BLOCK_M=FEW_MERGED if sized else MERGED, BLOCK_C=256, **lists)
        yield Case(
            f"merge tokens backward{' sizes' * sized}", merge_tokens.backward_kernel, constants, overrides=floats
        )


def cases() -> Iterator[Case]:
    """Every kernel at 16-bit, each role at the widths that real models have."""
    for qk, v in ((64, 64), (32, 64), (16, 64), (128, 128), (256, 256)):
        for kept in (False, True) if (qk, v) in ((64, 64), (256, 256)) else (False,):
            yield from attention_cases(qk, v, kept)
    for qk, v, kept in ((64, 64, True), (32, 32, False), (128, 128, False), (256, 256, True)):
        yield from attention_cases(qk, v, kept, added=True)
    yield Case("attention delta", attention_backward.delta_kernel, dict(BLOCK_V=64, BLOCK_M=score_rows(64)))
    yield from matmul_cases()
    yield from mlp_cases()
    for width in (192, 768, 1280):
        for kept in (False, True) if width == 768 else (False,):
            yield from layer_norm_cases(width, kept)
    yield from merge_cases()
    for planes, samples, tiles in ((2, 1, 64), (2, 8, 8), (3, 1, 64), (3, 8, 8)):
        weights = absent("weight0", "weight1") if planes == 3 else {}
        yield Case(f"fold {planes} planes, {samples} samples", fold.fold_kernel,
                   dict(PLANES=planes, SAMPLES=samples, TILES=tiles, COLUMNS=32, **weights), warps=8,
                   overrides=tuple((name, "*fp16") for name in ("sum0", "sum1", "weight0", "weight1")))  # fmt: skip
    for step in (8, 1):
        yield Case(f"group_dot tiles by {step}", group_dot.tiles_kernel,
                   dict(W=triton.language.float32, G=triton.language.float32, STEP=step, ROWS=8, BLOCK=256,
                        INTERPRETED=False))  # fmt: skip
    yield Case("group_dot slices", group_dot.slices_kernel, dict(MANY=MANY, SHORT=SHORT, FEW=FEW, LONG=LONG))
    yield Case("group_dot outputs", group_dot.outputs_kernel, dict(BLOCK=128),
               overrides=(("out", "*fp32"), ("scale", "*fp32")))  # fmt: skip


def signature(case: Case) -> dict[str, str]:
    """Argument types of a case's kernel, by name."""
    said = dict(case.overrides)

    def of(name: str) -> str:
        for names, kind in KINDS:
            if name in names:
                return kind
        return "i32"

    constants = {*case.constants, "BLOCK_M", "BLOCK_N", "BLOCK_K"}
    return {n: "constexpr" if n in constants else said.get(n) or of(n) for n in case.kernel.arg_names}


def compile_case(case: Case, arch: int, config: triton.Config) -> Report:
    """Compile a case with one of its configs for compute capability `arch`, as 80 or 100."""
    constants, kinds = {**case.constants, **config.kwargs}, signature(case)
    names = case.kernel.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if kinds[n].startswith("*")}
    source = ASTSource(fn=case.kernel, signature=kinds, attrs=aligned,
                       constexprs={(names.index(n),): v for n, v in constants.items() if n in names})  # fmt: skip
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages, **FUSED_MULTIPLY_ADD)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills, loop_spills = _resources(built.asm["cubin"])
    blocks = " ".join(f"{k[6:]}{v}" for k, v in config.kwargs.items())
    return Report(case.name, arch, f"{blocks} warps{config.num_warps} stages{config.num_stages}".strip(), registers,
                  spills, built.metadata.shared, len(built.asm["cubin"]), loop_spills)  # fmt: skip


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers a thread, bytes of stack and local memory, spilled values that move inside loops) of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _dump("--dump-resource-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found, usage
        spills = int(found[2]) + int(found[3])
        return int(found[1]), spills, spills_in_loops(_dump("-sass", file.name)) if spills else 0


def _dump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def spills_in_loops(sass: str) -> int:
    """Instructions of a listing that store or load local memory between a backward branch and its target."""
    lines = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^/]+?)\s*/\*", sass)]
    branches = ((at, int(to[1], 16)) for at, what in lines if (to := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", what)))
    loops = [(target, at) for at, target in branches if target < at]
    moved = [at for at, what in lines if re.search(r"\b(STL|LDL)\b", what)]
    return sum(any(start <= at <= end for start, end in loops) for at in moved)


def main(arch: int, names: Sequence[str] = ()) -> None:
    """Print, one JSON object a line, what every case, or each of these, takes on `arch` with its first config."""
    for case in cases():
        if not names or case.name in names:
            print(json.dumps(asdict(compile_case(case, arch, case.configs(arch)[0]))), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
