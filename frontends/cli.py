"""The `tilewright` command. Exit codes: 0 done, 1 done and the answer is no, 2 bad input, 130 interrupted.

Parsing imports no torch: each command's work is imported when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tilewright.compiler.diagnostics import OptionError, TilewrightError
from tilewright.runtime.settings import SettingsError
from tilewright.runtime.store import StoreError

OK, ANSWER_IS_NO, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

COMMANDS = {
    "passes": "list the passes, or show one with its options",
    "explain": "what a pipeline does to a model: matched, refused and why, cost, kernels",
    "why": "why a rule did or did not apply at a node",
    "run": "generate text, or run one denoising step",
    "bench": "time against eager and Inductor, interleaved in one run",
    "evaluate": "quality and speed beside a baseline",
    "calibrate": "what linear layers read on sample text, saved for smoothing and quantization",
    "plan": "choose a format for each linear layer under a budget of size or of error",
    "windows": "search the sliding-tile windows of a video model's heads, or take over a published table",
    "export": "write a rewritten model as a folder: ONNX, a pt2 package or its kernels",
    "verify": "check that an exported folder is as the export left it",
    "kernels": "the generated kernels and what they take",
    "bisect": "find the rewrite that breaks a model's results",
    "new-pass": "write a new pass file that passes its self-test",
    "cache": "where compiled kernels are kept: size, clear, verify, why a miss",
    "doctor": "check this machine: compiler, processor, cache, libraries",
}


@dataclass
class Result:
    """What a command gives: data for --json, lines for people, and the exit code."""

    data: Any
    lines: list[str] = field(default_factory=list)
    code: int = OK


class _Parser(argparse.ArgumentParser):
    """argparse that reports a bad command line as one line."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(message, remedy=f"see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="tilewright",
        description="Papers as passes: verified graph rewrites for PyTorch models.",
        epilog="exit codes: 0 done, 1 the answer is no, 2 bad input, 130 interrupted",
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    parser.add_argument("--print-completion", metavar="SHELL", help="print completion for bash, zsh or tcsh")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        sub.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
        _module(name).add_arguments(sub)
    return parser


def _module(name: str) -> Any:
    return importlib.import_module(f"tilewright.frontends.commands.{name.replace('-', '_')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Bad input is one line on stderr."""
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
        if args.version:
            from tilewright import __version__

            print(__version__)
            return OK
        if args.print_completion:
            print(_completion(parser, args.print_completion))
            return OK
        if args.command is None:
            parser.print_help()
            return BAD_INPUT
        result: Result = _module(args.command).run(args)
        _print(result, as_json=args.json)
        return result.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return OK
    except BaseException as error:
        line = error_line(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        return BAD_INPUT


def _print(result: Result, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.data, indent=2, sort_keys=True, default=str))
    else:
        for line in result.lines:
            print(line)
    sys.stdout.flush()


def _completion(parser: argparse.ArgumentParser, shell: str) -> str:
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise OptionError(
            f"--print-completion = {shell!r}: expected one of {', '.join(shtab.SUPPORTED_SHELLS)}"
        )
    return str(shtab.complete(parser, shell=shell))


def error_line(error: BaseException) -> str | None:
    """`error: Code: message (remedy)` for an error of ours, also when torch wrapped it; None for any
    other."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, TilewrightError):
            return f"error: {current.code}: {current.line()}"
        if isinstance(current, (StoreError, SettingsError)):
            return f"error: {type(current).__name__}: {' '.join(str(current).split())}"
        current = getattr(current, "inner_exception", None) or current.__cause__ or current.__context__
    return None


if __name__ == "__main__":
    sys.exit(main())
