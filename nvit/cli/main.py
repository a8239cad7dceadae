"""The `nvit` command: finds the command, gives it its flags, runs it; an error is one line and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..utils.launch import launched
from . import failures
from .command import finished, flat, no_model, numbered, resumable, with_settings
from .words import UsageError

if TYPE_CHECKING:
    from .command import Command

BAD_USAGE, FAILED, INTERRUPTED, UNREAD = 2, 1, 130, 141
"""Exit codes; the last two are a shell's words for SIGINT and SIGPIPE."""

_LEFT = 34
"""Columns of the command's own words in the list of all."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line, under torchrun one process of it; returns the exit code. Where whoever read its output has
    left (`nvit --help | head -1`), it ends without a word."""
    try:
        try:
            return _run(args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:  # what waits in it would fail once more, and be told, when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return UNREAD


def _run(args: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0 if args else BAD_USAGE
    if args[0] == "--version":
        print(__version__)
        return 0
    config = None
    try:
        with _one_voice():
            command, config, here = parse(args)
        if launched()[1] > 1 and not command.ranks:
            raise UsageError(f"nvit {args[0]} runs in one process; start it without torchrun")
        from .. import parallel

        parallel.join()
        config = config if here else parallel.from_main(lambda: numbered(config))
        with parallel.watch():
            _work(command, config)
        parallel.leave()
    except UsageError as e:
        failures.say(e)
        return BAD_USAGE
    except BrokenPipeError:
        raise
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
    from .commands import COMMANDS

    lines = [
        f"usage: nvit COMMAND …        nvit {__version__}",
        "",
        "Prune vision transformers to a latency you choose.",
        "",
    ]
    for name, command in COMMANDS.items():
        said = command.flags.__doc__ if command.demo is None else "The bundled ViT pruned on the bundled digits."
        begin = f"  nvit {name} {command.shown}".rstrip().ljust(_LEFT)
        lines += textwrap.wrap(begin + said.splitlines()[0], 80, subsequent_indent=" " * _LEFT)
    lines += [
        "",
        "MODEL is a timm name, hf-hub:NAME, local-dir:FOLDER, 'digits', or the folder of",
        "a snapshot, a run or a Hugging Face model. Every command has --help, and takes",
        "its flags from a RECIPE.toml as well. What completes them in a shell:",
        "  nvit --tyro-print-completion bash       (or zsh)",
    ]
    return "\n".join(lines)


def parse(args: Sequence[str]) -> tuple[Command, Any, bool]:
    """The command, its dataclass from a recipe and flags, which win, and whether its folder was named.

    Raises:
        UsageError: they are off, in one line.
        SystemExit: help was asked for, or a script for completion.
    """
    import tyro

    from . import groups, recipe, words
    from .commands import COMMANDS

    whole = args[0].startswith("--tyro-") or (len(args) > 1 and args[0] == "analyze" and args[1] in words.HELP)
    line = words.Line("") if whole else words.read(args, COMMANDS)
    chosen = COMMANDS.get(line.name)
    try:
        if chosen is None:
            every = groups.union(COMMANDS, {name: command.flags() for name, command in COMMANDS.items()})
            tyro.cli(every, prog="nvit", args=args, config=groups.HOW)
        source = line.recipe or chosen.demo
        raw = recipe.read_toml(source) if source else {}
        default = recipe.from_dict(chosen.flags, raw, str(source))
        if chosen.models and chosen.needy and not (line.models or line.asks or getattr(default, chosen.models)):
            raise UsageError(no_model(line.name, chosen.takes))
        ordered = [*line.name.split(), *line.models, *line.flags]
        found = tyro.cli(groups.union(COMMANDS, {line.name: default}), prog="nvit", args=ordered, config=groups.HOW)
        config = with_settings(default, groups.settings_of(found))
        words.check_apart(line, chosen, raw, flat(config))
        if hasattr(config, "check"):
            config.check()
        if config.general.dump_config and not launched()[0]:
            recipe.dump(config, chosen, line.name)
    except ValueError as e:
        raise UsageError(str(e)) from None
    named = "out" in line.given or bool(line.recipe and "out" in raw) or not config.out
    return chosen, config, named


def _work(command: Command, config: Any) -> None:
    """A command's work; of a run that is finished and is to be resumed, its result once more."""
    from .. import parallel
    from .memory import in_memory

    work = importlib.import_module(f"{__package__}.{command.work}")
    if getattr(config, "resume", False) and (found := parallel.from_main(lambda: finished(config))):
        if parallel.main():
            print(f"{config.out} is finished already; this is its result")
            work.tell(config, found)
    else:
        in_memory(work.run, config)


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Help and usage errors from the first of several processes alone."""
    with contextlib.ExitStack() as stack:
        if launched()[0]:
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nothing))
            stack.enter_context(contextlib.redirect_stderr(nothing))
        yield


if __name__ == "__main__":
    sys.exit(main())
