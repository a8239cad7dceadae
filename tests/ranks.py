"""Runs of several ranks: processes forked from one that has imported everything, each with the variables that torchrun
would set. `python -m tests.ranks FOLDER` plays all scenarios and leaves what `tests/test_distributed.py` looks at."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

import nvit
from nvit import FinetuneConfig, adapters, parallel, tasks
from nvit.cli import main as cli
from nvit.criteria.base import RunningMean
from nvit.prune.plan import Plan
from nvit.prune.pruner import Pruner
from nvit.structure.run_state import load_run_state
from nvit.training.data import TrainingData, shares
from nvit.training.distill import Objective
from nvit.training.trainer import Trainer
from tests.families import HOSTS, ONE_OF_EACH
from tests.hosts import images, labels, make
from tests.runs import NoisyImages, config, table

QUICK = {"interval": 1, "bundles_per_step": 1, "bundle_mlp": 8, "lr": 4.0, "optimizer": "sgd", "latency_target": (0.7,)}
VARIANTS = {
    "train": QUICK,
    "frozen": QUICK | {"lr": 0.0},
    "mixup": QUICK
    | {"mixup": 0.8, "cutmix": 1.0, "batch_size": 9, "criterion": "abs", "ema": 0.9, "latency_target": (0.85,)},
    "uneven": QUICK | {"batch_size": 10, "criterion": "taylor", "grad_clip": 0.5, "latency_target": (0.85,)},
    "shot_hessian": {"train": False, "criterion": "hessian", "labels": "sampled", "batch_size": 10},
    "shot_abs": {"train": False, "criterion": "abs", "rounds": 2},
    "shot_fisher": {"train": False, "criterion": "fisher", "batch_size": 10, "rounds": 2},
    "shot_nvit": {"train": False, "criterion": "nvit", "batch_size": 10},
}
"""Recipes that must decide alike on any number of ranks; in fp64, so that the order of a sum decides nothing."""
PLAYED = {
    1: [f"{v}-copies" for v in VARIANTS],
    2: [f"{v}-copies" for v in VARIANTS] + [f"{v}-shards" for v in VARIANTS if v not in ("frozen", "shot_abs")],
    4: ["train-copies", "train-shards", "frozen-copies"],
}
"""By number of ranks, the variants played, with a copy of the weights on each rank or with shards."""


class DoubleImages(NoisyImages):
    def __getitem__(self, i: int):
        image, label = super().__getitem__(i)
        return image.double(), label


def arguments(variant: str, host: str = "plain", **more):
    """What `nvit.prune` takes, in fp64."""
    settings, model = config(**(VARIANTS[variant] | more)), make(host, torch.float64)
    data = TrainingData(DoubleImages(), settings.batch_size, settings.seed)
    return model, data, settings, table(model, settings)


def prune(variant: str, host: str, **more):
    """A run: its result, its model, and a hash of the masks of every decision."""
    model, *rest = arguments(variant, host, **more)
    decided, set_masks = [], Pruner._set_masks

    def note(pruner, masks):
        decided.append(hashlib.sha256(b"".join(m.numpy().tobytes() for m in masks.values())).hexdigest())
        set_masks(pruner, masks)

    with mock.patch.object(Pruner, "_set_masks", note):
        result = nvit.prune(model, *rest)
    return result, model, list(dict.fromkeys(decided))


def fork(folder: Path, count: int, job: Callable, *args, seconds: float = 300) -> list[int | None]:
    """Exit codes of `count` ranks of `job(*args)`: negative for a signal, None for one that had to be killed.

    That is after `seconds`, which only a rank that hangs takes, however busy the machine. What a rank prints goes to
    `folder`/rank-N.txt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    context = multiprocessing.get_context("fork")
    ranks = []
    for rank in range(count):
        env = {k: str(v) for k, v in (launcher | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        ranks.append(context.Process(target=_rank, args=(env, folder / f"rank-{rank}.txt", job, args)))
        ranks[-1].start()
    end, codes = time.monotonic() + seconds, []
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
    return codes


def _rank(env: dict[str, str], log: Path, job: Callable, args: tuple) -> None:
    os.environ.update(env)
    with open(log, "w", buffering=1) as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
        sys.stdout = sys.stderr = f
        try:
            code = job(*args) or 0
        except BaseException:
            traceback.print_exc()
            code = 70
        f.flush()
        os._exit(code)


# --- scenarios --------------------------------------------------------------------------------------------------------


def decisions(root: Path) -> None:
    """The variants of `PLAYED`: every rank's decisions, weights and snapshots."""
    parallel.join()
    found, count, rank = {}, parallel.world(), parallel.rank()
    for name in PLAYED[count]:
        variant, wrapper = name.split("-")
        host = "deit_distilled" if variant == "uneven" else "plain"
        result, model, decided = prune(variant, host, fsdp=wrapper == "shards")
        weights = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
        weights |= {f"small.{n}": p.detach() for n, p in result.model.named_parameters()}
        save_file(weights, root / f"{name}-{rank}-of-{count}.safetensors")
        found[name] = {"decided": decided, "history": result.history}
    (root / f"decided-{rank}-of-{count}.json").write_text(json.dumps(found))
    parallel.leave()


def finetuned(root: Path, name: str, fsdp: bool) -> None:
    settings = FinetuneConfig(epochs=1.0, lr=0.5, optimizer="sgd", batch_size=8, fsdp=fsdp, ema=0.5, distill_weight=1.0)
    teacher = make("plain", torch.float64, seed=5)
    data = TrainingData(DoubleImages(), 8)
    model = nvit.finetune(make("plain", torch.float64), data, settings, teacher=teacher)
    save_file({n: p.detach() for n, p in model.named_parameters()}, root / f"{name}-{parallel.rank()}.safetensors")
    parallel.leave()


def checkpointed() -> None:
    """Blocks in shards that compute their activations again: the whole model's gradients, for every family."""
    parallel.join()
    for name in ONE_OF_EACH:
        host = HOSTS[name]().double()
        adapter = adapters.find(host)
        model = adapter.prepare(host)
        g = torch.Generator().manual_seed(0)
        x = torch.randn(2, *adapter.preprocess(model)["input_size"], generator=g, dtype=torch.float64)
        adapter.logits(model, x).mean.square().sum().backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        call, runs = parallel.shard(model, adapter.logits), []
        blocks = adapter.blocks(call.model)
        for block in blocks:
            block.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        with Plan(checkpoint=True).running(call.model):
            logits = call(x)
        logits.mean.square().sum().backward()
        assert len(runs) == 2 * len(blocks), f"{name}: {len(runs)} runs of {len(blocks)} blocks"
        found = {n: parallel.full(p.grad) for n, p in call.model.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys(), name
        for n, grad in expected.items():
            torch.testing.assert_close(found[n], grad, rtol=0, atol=1e-12, msg=f"{name}: {n}")
    parallel.leave()


def killed(out: Path, step: int, more: dict) -> int:
    """The last rank dies after `step` more steps. 1 where that is noticed, 0 where the run ended well."""
    steps = [0]

    def progress(done: int, total: int, text: str) -> None:
        steps[0] += 1
        if steps[0] == step and parallel.rank() == parallel.world() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        nvit.prune(*arguments("train", **more), out=out, resume=True, progress=progress)
    except parallel.RankLost as e:
        print(e)
        return 1
    return 0


def ended(root: Path, out: Path) -> None:
    """A run to its end, from the run state in `out` if there is one."""
    steps = []
    model, *rest = arguments("train")
    result = nvit.prune(model, *rest, out=out, resume=True, progress=lambda *_: steps.append(0))
    tensors = {f"mask.{n}": m for n, m in result.masks.items()}
    tensors |= {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    save_file(tensors, root / f"ended-{out.name}.safetensors")
    (root / f"ended-{out.name}.json").write_text(json.dumps({"history": result.history, "steps": len(steps)}))


def disagreeing() -> int:
    """Rank 1 sees other scores at its third decision."""
    value, asked = RunningMean.value, [0]

    def other(mean):
        asked[0] += 1
        scores = value(mean)
        return {n: s + 1e-12 for n, s in scores.items()} if parallel.rank() == 1 and asked[0] == 3 else scores

    RunningMean.value = other
    try:
        nvit.prune(*arguments("train"))
    except ValueError as e:
        print(e)
        return 3
    return 0


def words() -> int:
    """What ranks say to each other: sums, rank 0's errors, batches that differ, batches too small."""
    parallel.join()
    rank, world = parallel.rank(), parallel.world()
    assert parallel.sums([rank, 1.0], torch.device("cpu")) == [world * (world - 1) / 2, world]
    assert parallel.from_main(lambda: parallel.rank()) == 0
    for wrong, says in (
        (lambda: parallel.from_main(Path("/no/such/file").read_bytes), "No such file"),
        (lambda: parallel.share(2 * world - 1), f"give --batch-size {2 * world}"),
        (
            lambda: next(shares([(torch.full((8, 1), rank), torch.zeros(8))])),
            "the loader's first batch differs",
        ),
    ):
        try:
            wrong()
        except (ValueError, OSError) as e:
            assert says in str(e), e
        else:
            raise AssertionError(f"nothing was raised; expected {says}")
    batch = torch.arange(11), torch.arange(11)
    assert torch.equal(parallel.take(batch)[0], torch.tensor(parallel.share(11)))
    print(json.dumps(parallel.share(11)))
    parallel.leave()
    return 0


def nan_on_one_rank() -> int:
    """One bad image, on whichever rank, ends all ranks with the same words."""
    parallel.join()
    model, _, settings, _ = arguments("train")
    trainer = Trainer(model, Objective(tasks.of("auto", model)), settings, settings.lr, None)
    x, y = images(model, 8), labels(model, 8)
    trainer.train_step(*parallel.take((x, y)))
    x[0] = float("nan")
    try:
        trainer.train_step(*parallel.take((x, y)))
    except FloatingPointError as e:
        print(e)
        return 3
    return 0


def command(*args: str) -> int:
    return cli.main(list(args))


def play(root: Path) -> None:
    """All scenarios."""
    torch.set_num_threads(1)
    codes: dict[str, object] = {}

    def start(name: str, count: int, job: Callable, *args) -> None:
        codes[name] = fork(root / f"said-{name}", count, job, *args)

    for count in PLAYED:
        start(f"decisions-{count}", count, decisions, root)
    for count, fsdp in ((1, False), (2, False), (3, True)):
        start(f"finetuned-{count}", count, finetuned, root, f"finetuned-{count}", fsdp)
    start("checkpointed", 2, checkpointed)
    start("whole", 1, ended, root, root / "whole")
    began = time.monotonic()
    start("killed-copies", 2, killed, root / "killed", 4, {"save_every": 1e9})
    codes["first-state"] = load_run_state(root / "killed" / "run_state.safetensors")[1]["trainer"]["step"]
    start("killed-shards", 3, killed, root / "killed", 4, {"save_every": 0.0, "fsdp": True})
    codes["second-state"] = load_run_state(root / "killed" / "run_state.safetensors")[1]["trainer"]["step"]
    codes["seconds"] = time.monotonic() - began
    start("resumed", 4, ended, root, root / "killed")
    start("disagreeing", 3, disagreeing)
    start("words", 3, words)
    start("nan", 2, nan_on_one_rank)
    quick = ("demo", "--table", "analytic", "--no-train", "--device", "cpu", "--latency-batch", "2", "--out")
    start(
        "command",
        2,
        command,
        *quick,
        str(root / "run"),
        "--latency-seconds",
        "0.1",
        "--finetune-epochs",
        "0.2",
        "--fsdp",
    )
    start(
        "tuned", 2, command, "finetune", str(root / "run/target-0.5"), "--epochs", "0.1", "--out", str(root / "tuned")
    )
    start("bad-flag", 2, command, "demo", "--latency-target", "1.5")
    start("bad-group", 2, command, *quick, str(root / "bad"), "--freeze", "blocks.9.*")
    start("one-process", 2, command, "evaluate", "digits")
    (root / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    play(Path(sys.argv[1]))
