"""`tilewright kernels`: which kernels there are, for which targets, and what they take."""

from __future__ import annotations

import argparse

from tilewright.frontends.cli import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="?", help="only kernels of this semantic op")


def run(args: argparse.Namespace) -> Result:
    from tilewright.compiler.diagnostics import OptionError, nearest
    from tilewright.kernels.table import list_kernels

    rows = list_kernels()
    if args.op:
        known = {r["op"] for r in rows}
        if args.op not in known:
            raise OptionError(f"no kernel of op {args.op!r}", remedy=nearest(args.op, known))
        rows = [r for r in rows if r["op"] == args.op]
    lines = [
        f"{row['op']}  " + "  ".join(f"{k}: {v}" for k, v in row.items() if k != "op" and v) for row in rows
    ]
    return Result(rows, lines)
