"""The `nvit` command: finds the command, gives it its flags, runs it; an error is one line and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from .. import __version__, parallel
from . import analyze_correlation, analyze_widths, compare, evaluate, failures, finetune, latency, prune, sparsify
from .command import Command, flat, resumable
from .flags import DIGITS
from .recipe import from_toml

COMMANDS: dict[str, Command] = {
    "prune": prune.COMMAND,
    "finetune": finetune.COMMAND,
    "evaluate": evaluate.COMMAND,
    "compare": compare.COMMAND,
    "latency": latency.COMMAND,
    "sparsify": sparsify.COMMAND,
    "analyze widths": analyze_widths.COMMAND,
    "analyze correlation": analyze_correlation.COMMAND,
}

BAD_USAGE, FAILED, INTERRUPTED = 2, 1, 130


class UsageError(Exception):
    """The words of a command line are off."""


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
        failures.say(e)
        return BAD_USAGE
    except BrokenPipeError:
        return FAILED
    except KeyboardInterrupt:
        again = "; the same command with --resume goes on" if config is not None and resumable(config) else ""
        failures.say(f"interrupted{again}")
        return INTERRUPTED
    except Exception as e:
        known = {} if config is None else flat(config)
        failures.explain(e, args, known.get("out", ""), debug=known.get("debug", "--debug" in args))
        return FAILED
    return 0


def _help() -> str:
    lines = [
        f"usage: nvit COMMAND …        nvit {__version__}",
        "",
        "Prune vision transformers to a latency you choose.",
        "",
    ]
    for name, command in COMMANDS.items():
        lines.append(f"  nvit {name} {command.words}".ljust(52) + command.flags.__doc__.splitlines()[0])
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
    if not recipes and command.demo and "--model" not in flags:
        recipes = [str(command.demo)]
    try:
        defaults = from_toml(command.flags, recipes[0]) if recipes else command.flags()
        config = tyro.cli(command.flags, prog=f"nvit {name} {command.words}", default=defaults, args=flags)
        if hasattr(config, "check"):
            config.check()
    except ValueError as e:
        raise UsageError(str(e)) from None
    return config, words


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Help and usage errors from the first of several processes alone."""
    with contextlib.ExitStack() as stack:
        if parallel.launched()[0]:
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nothing))
            stack.enter_context(contextlib.redirect_stderr(nothing))
        yield


if __name__ == "__main__":
    sys.exit(main())
