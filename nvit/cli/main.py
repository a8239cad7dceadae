"""The `nvit` command: recipe and flags to a dataclass, one library call, a table. No logic."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from .. import __version__, parallel
from ..prune.budget import show as show_bytes
from ..structure.snapshot import BUNDLED
from ..utils.progress import silent
from ..utils.report import show
from . import jobs
from .commands import (
    DIGITS,
    CompareCommand,
    CorrelationCommand,
    EvaluateCommand,
    FinetuneCommand,
    LatencyCommand,
    PruneCommand,
    SparsifyCommand,
    WidthsCommand,
)
from .recipe import from_toml

BAD_USAGE, FAILED, INTERRUPTED = 2, 1, 130


class UsageError(Exception):
    """The words of a command line are off."""


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal; elsewhere a line on stderr every ten seconds and when the work changes; of rank 0 alone."""
    if not parallel.main():
        yield silent
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        last = {"kind": "", "at": 0.0}

        def line(done: int, total: int, text: str) -> None:
            kind, now = text.partition(":")[0], time.monotonic()
            if kind != last["kind"] or now - last["at"] > 10:
                last.update(kind=kind, at=now)
                print(f"{text} ({done}/{total})" if total else text, file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Bar(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total, text: bar.update(task, completed=done, total=total or None, description=text)


@dataclass(frozen=True)
class Command:
    """A command line's shape: its dataclass, its leading words, what runs it, and whether several ranks can."""

    config: type
    words: str
    run: Callable[[Any, Sequence[str]], None]
    least: int = 0
    most: int | None = 0
    ranks: bool = False


def _prune(command: PruneCommand, _: Sequence[str]) -> None:
    with _progress() as progress:
        found = jobs.run_prune(command, progress)
    if not found:
        return
    rows = [{"name": "dense", "predicted_ratio": 1.0, "measured_ratio": 1.0} | found["dense"]]
    rows += [{"name": f"pruned to {s['target']:g}"} | s for s in found["snapshots"]]
    show(f"{found['model']}: {found['latency_batch']} images a batch on {found['device']}", rows)
    for s in found["snapshots"]:
        off = s["measured_ratio"] / s["predicted_ratio"] - 1
        print(f"{s['path']}: measured latency is {off:+.1%} of the prediction; nvit.load({s['path']!r})")
    if memory := found.get("memory"):
        print(f"memory: peak {show_bytes(memory['peak'])} of {command.budget}; {memory['picked']}")
    if command.refit:
        print(f"refit: {found['refit_seconds']:.0f} s, peak memory {found['refit_peak_memory'] / 1e6:.0f} MB")
    print(f"{command.out}/result.json written after {found['seconds']:.0f} s")


def _finetune(command: FinetuneCommand, words: Sequence[str]) -> None:
    with _progress() as progress:
        found = jobs.run_finetune(words[0], command, progress)
    if not found:
        return
    before = {"name": "before", "top1": found["top1_before"]}
    show(f"{words[0]}: {found['epochs']:g} epochs", [before, {"name": "after"} | found])
    print(f"{found['path']}: nvit.load({found['path']!r})")


def _sparsify(command: SparsifyCommand, words: Sequence[str]) -> None:
    with _progress() as progress:
        found = jobs.run_sparsify(words[0], command, progress)
    rows = [{"name": "dense", "top1": found["top1_dense"]}, {"name": "2:4", "top1": found["top1_sparse"]}]
    if command.epochs:
        rows.append({"name": f"2:4 finetuned {command.epochs:g} epochs", "top1": found["top1"]})
    show(f"{words[0]}: {found['sparse_layers']} of {len(found['layers'])} projections are 2:4", rows)
    for layer in found["layers"]:
        ms = (layer["dense_ms"], layer["sparse_ms"])
        times = "" if None in ms else ": dense {:.3f} ms, sparse {:.3f} ms".format(*ms)
        print(
            f"  {layer['weight']} keeps {layer['kept']:.3f} of its magnitude; {layer['backend']}, {layer['why']}{times}"
        )
    print(f"{found['path']}: nvit.load({found['path']!r})")


def _evaluate(command: EvaluateCommand, words: Sequence[str]) -> None:
    with _progress() as progress:
        found = jobs.run_evaluate(words[0], command, progress)
    show(f"{found['images']} images", [{"name": words[0]} | found])
    print(f"{found['images_per_s']:.1f} images/s")


def _compare(command: CompareCommand, words: Sequence[str]) -> None:
    with _progress() as progress:
        found = jobs.run_compare(words, command, progress)
    show(f"{found['latency_batch']} images a batch on {found['device']}", found["models"])


def _latency(command: LatencyCommand, _: Sequence[str]) -> None:
    with _progress() as progress:
        table, found = jobs.run_latency(command, progress)
    where = "multiply-accumulates, 1 G counted as 1 ms"
    if table.setting is not None:
        s = table.setting
        where = f"{s.device}, {s.dtype}, batch {s.batch_size}, {s.tokens} tokens, {s.versions}"
    print(where)
    print(f"dense model: {found['dense_ms']:.3f} ms; ms saved per unit, mean over the range:")
    for kind in ("emb", "heads", "qk_dim", "v_dim", "mlp"):
        print(f"  {kind:8s}{found[f'ms_per_{kind}']:.5f}")
    if command.out:
        print(f"{command.out}/latency_table.json")


def _widths(command: WidthsCommand, words: Sequence[str]) -> None:
    found = jobs.run_widths(words, command)
    print(f"{found['csv']}\n{found['figure']}")


def _correlation(command: CorrelationCommand, words: Sequence[str]) -> None:
    with _progress() as progress:
        found = jobs.run_correlation(words[0], command, progress)
    rows = [{"name": f"{c['criterion']}, {c['kind']}"} | c for c in found["correlations"]]
    show(f"{words[0]}: {found['bundles']} bundles removed one by one, {found['images']} images", rows)
    print(f"{found['csv']}\n{found['figure']}")


COMMANDS: dict[str, Command] = {
    "prune": Command(PruneCommand, "[RECIPE.toml]", _prune, ranks=True),
    "finetune": Command(FinetuneCommand, "MODEL [RECIPE.toml]", _finetune, 1, 1, ranks=True),
    "evaluate": Command(EvaluateCommand, "MODEL [RECIPE.toml]", _evaluate, 1, 1),
    "compare": Command(CompareCommand, "MODEL MODEL … [RECIPE.toml]", _compare, 1, None),
    "latency": Command(LatencyCommand, "[RECIPE.toml]", _latency),
    "sparsify": Command(SparsifyCommand, "SNAPSHOT [RECIPE.toml]", _sparsify, 1, 1),
    "analyze widths": Command(WidthsCommand, "SNAPSHOT …", _widths, 1, None),
    "analyze correlation": Command(CorrelationCommand, "MODEL", _correlation, 1, 1),
}


def _help() -> str:
    lines = [
        f"usage: nvit COMMAND …        nvit {__version__}",
        "",
        "Prune vision transformers to a latency you choose.",
        "",
    ]
    for name, command in COMMANDS.items():
        lines.append(f"  nvit {name} {command.words}".ljust(52) + command.config.__doc__.splitlines()[0])
    lines += ["", f"MODEL is a timm name, a snapshot or Hugging Face folder, or {DIGITS!r}. Every command has --help."]
    return "\n".join(lines)


def _split(args: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Command name, leading words, flags."""
    name, rest = args[0], list(args[1:])
    if name == "analyze":
        if not rest or rest[0].startswith("-"):
            analyses = [name.partition(" ")[2] for name in COMMANDS if name.startswith("analyze ")]
            raise UsageError(f"usage: nvit analyze {{{','.join(analyses)}}} MODEL …")
        name = f"analyze {rest.pop(0)}"
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")
    first_flag = next((i for i, a in enumerate(rest) if a.startswith("-")), len(rest))
    return name, rest[:first_flag], rest[first_flag:]


def _configure(name: str, command: Command, words: list[str], flags: list[str]) -> tuple[Any, list[str]]:
    """The command's dataclass from its recipe and flags, and its other leading words."""
    recipes = [w for w in words if w.endswith(".toml")]
    words = [w for w in words if not w.endswith(".toml")]
    if len(recipes) > 1:
        raise UsageError(f"one recipe at most, found {', '.join(recipes)}")
    asked = bool({"-h", "--help"} & set(flags))
    if not asked and (len(words) < command.least or (command.most is not None and len(words) > command.most)):
        raise UsageError(f"usage: nvit {name} {command.words} [--flags]; found {' '.join(words) or 'no'} model")
    try:
        if not recipes and command.config is PruneCommand and "--model" not in flags:
            recipes = [str(BUNDLED.with_name("digits.toml"))]
        defaults = from_toml(command.config, recipes[0]) if recipes else command.config()
        config = tyro.cli(command.config, prog=f"nvit {name} {command.words}", default=defaults, args=flags)
        if isinstance(config, (PruneCommand, CorrelationCommand)):
            config.check()
    except ValueError as e:
        raise UsageError(str(e)) from None
    return config, words


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line, under torchrun one process of it; returns the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0 if args else BAD_USAGE
    if args[0] == "--version":
        print(__version__)
        return 0
    config = None
    try:
        name, words, flags = _split(args)
        with _one_voice():
            config, words = _configure(name, COMMANDS[name], words, flags)
        if parallel.launched()[1] > 1 and not COMMANDS[name].ranks:
            raise UsageError(f"nvit {name} runs in one process; start it without torchrun")
        parallel.join()
        with parallel.watch():
            COMMANDS[name].run(config, words)
        parallel.leave()
    except UsageError as e:
        return _say(e, BAD_USAGE)
    except BrokenPipeError:
        return FAILED
    except (ValueError, FloatingPointError, OSError, ModuleNotFoundError) as e:
        return _say(e, FAILED)
    except KeyboardInterrupt:
        again = "; the same command with --resume goes on" if hasattr(config, "resume") else ""
        return _say(f"interrupted{again}", INTERRUPTED)
    return 0


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Help and usage errors from the first of several processes alone."""
    with contextlib.ExitStack() as stack:
        if parallel.launched()[0]:
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nothing))
            stack.enter_context(contextlib.redirect_stderr(nothing))
        yield


def _say(error: object, code: int) -> int:
    if not parallel.speaks():
        return code
    print(f"nvit: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
