"""The command `hf-ewc`: finds the subcommand, runs it, and turns what goes wrong into one message and an exit code.

Exit codes: 0 done · 1 the machine or the Hub failed (full disk, no network) · 2 a setting, a file or the Fisher is wrong ·
130 interrupted.
"""

from __future__ import annotations

import atexit
import difflib
import importlib
import io
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from .. import __version__
from ..errors import EWCError, HubUnavailableError
from ..files import is_disk_full

COMMANDS = {
    "demo": "see it work in under three minutes, on this machine, without network",
    "fisher": "measure which weights carry what the model must keep",
    "train": "teach the model something new while those weights hold",
    "evaluate": "what was learned, what was forgotten",
    "sweep": "train and evaluate for several λ, with a table, a picture and a report",
    "compare": "base and adapted model side by side, on a page of this machine",
    "merge": "a trained model goes part of the way back to its base, each weight by its importance",
    "push": "publish a Fisher, a model, or a whole release on the Hub",
    "pull": "fetch a Fisher from the Hub in advance",
    "card": "the page of a model or a Fisher, checked against its data; and where it comes from",
    "bench": "measure on this machine what the README claims",
    "env": "versions, devices and settings, for bug reports",
}

# second words: `hf-ewc fisher convert` is `cli/fisher_convert.py`
SUBCOMMANDS = {
    "fisher convert": "store a Fisher with another codec, and see what that costs",
    "fisher fold": "several Fishers with their anchors become one",
    "fisher import": "make a Fisher from the Adam state of a checkpoint, as an approximation",
    "push fisher": "a Fisher as a dataset repository",
    "push checkpoint": "an adapted model with its card",
    "push space": "a page that shows a model beside its base",
    "push release": "Fisher, model, Space and collection, visible together or not at all",
    "pull fisher": "into the cache or a folder, checked",
}

# How an interrupted run goes on. The others start again quickly.
CONTINUE = {
    **{"fisher": " --resume", "train": " --resume", "sweep": "", "demo": " --resume"},
    **dict.fromkeys(("push fisher", "push checkpoint", "push space", "push release", "pull fisher"), ""),
}

HELP = f"""\
hf-ewc {__version__}: continue to pretrain all weights of a language model without losing what it knew.

Usage: hf-ewc COMMAND [--config FILE.yaml] [--key value …]

{{commands}}

Try it:           hf-ewc demo
Your own model:   hf-ewc fisher --help, then train, then evaluate
All settings go into one YAML file, as flags, or both; a flag overrides the file.
"""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = [f"  {name:<16}{summary}" for name, summary in sorted({**COMMANDS, **SUBCOMMANDS}.items(), key=_place)]
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"hf-ewc {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean `hf-ewc {close[0]}`?" if close else f"The commands are {', '.join(COMMANDS)}."
        print(f"hf-ewc: there is no command `{name}`. {hint}", file=sys.stderr)
        return 2
    argv = argv[1:]
    if argv and f"{name} {argv[0]}" in SUBCOMMANDS:
        name, argv = f"{name} {argv[0]}", argv[1:]
    elif argv and not argv[0].startswith("-"):  # no command takes a word without a setting, but for some with a second name
        second = [full.split()[1] for full in SUBCOMMANDS if full.split()[0] == name]
        if close := difflib.get_close_matches(argv[0], second, n=1):
            print(f"hf-ewc: there is no command `{name} {argv[0]}`. Did you mean `hf-ewc {name} {close[0]}`?", file=sys.stderr)
            return 2
        if name in ("push", "pull"):
            there = ", ".join(f"`hf-ewc {name} {word}`" for word in second)
            print(f"hf-ewc: there is no command `{name} {argv[0]}`. There is {there}.", file=sys.stderr)
            return 2
    command = importlib.import_module(f".{name.replace(' ', '_')}", __package__)
    if "-h" in argv or "--help" in argv:
        print(command.HELP, end="")
        return 0
    return guarded(name, command.run, argv)


def _place(entry: tuple[str, str]) -> int:
    """Where a command stands in the help: a second word behind its first."""
    return list(COMMANDS).index(entry[0].split()[0])


def guarded(name: str, run: Callable[[list[str]], int], argv: list[str]) -> int:
    """Call `run(argv)`; mistakes in the input, a full disk and Ctrl-C end in a message instead of a traceback."""
    # torch, transformers and TRL announce what will change in their next versions; the pinned versions are the ones that run
    warnings.simplefilter("ignore", FutureWarning)
    try:
        return run(argv)
    except EWCError as error:
        print(f"hf-ewc {name}: {error}", file=sys.stderr)
        return 1 if isinstance(error, HubUnavailableError) else 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        if name in CONTINUE:
            flag = "" if "--resume" in argv else CONTINUE[name]
            print(f"Continue with: hf-ewc {name} {shlex.join(argv)}{flag}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hf-ewc … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not is_disk_full(error):
            if isinstance(error, OSError) and error.strerror:
                what = f"'{error.filename}' cannot be used" if error.filename is not None else "the system refused"
                print(f"hf-ewc {name}: {what}: {error.strerror}.", file=sys.stderr)
                return 1
            raise
        again = f" with `{CONTINUE[name].strip()}`" if CONTINUE.get(name) else ""
        print(
            f"hf-ewc {name}: the disk is full ({error}). What was complete before stays as it was. Free some space, then "
            f"run the same command again{again}.",
            file=sys.stderr,
        )
        return 1


def end_process(code: int) -> NoReturn:
    """
    End this process with an exit code, in a way that processes which talked to each other through gloo survive.

    One of gloo's threads may free a tensor after the work that it was for, and needs the interpreter's lock for that. If the
    interpreter is being torn down by then, Python ends that thread inside a C++ destructor and the process aborts
    ("terminate called without an active exception", exit code −6) although all is done: seen in one of some hundred runs; the
    same as https://github.com/pytorch/pytorch/pull/179291. So what is to be done at exit is done here, and no more.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def command() -> NoReturn:
    """What the installed command `hf-ewc` calls."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without λ shows a question mark, and the run goes on
    end_process(main())


if __name__ == "__main__":
    command()
