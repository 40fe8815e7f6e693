"""`tilewright kernels`: the kernels there are and what they take; `report` reads their machine code."""

from __future__ import annotations

import argparse
from typing import Any

from tilewright.frontends.cli import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "op", nargs="*", help="only kernels of these semantic ops; a first word `report` analyses GPU code"
    )
    parser.add_argument(
        "--target", action="append", metavar="ARCH", help="report: sm_80, sm_90 (default), ...; repeatable"
    )


def run(args: argparse.Namespace) -> Result:
    from tilewright.compiler.diagnostics import OptionError, nearest
    from tilewright.kernels.table import list_kernels

    rows = list_kernels()
    is_report = args.op[:1] == ["report"]
    asked = args.op[1:] if is_report else args.op
    known = {r["op"] for r in rows}
    for op in asked:
        if op not in known:
            raise OptionError(f"no kernel of op {op!r}", remedy=nearest(op, known))
    if is_report:
        return _report(asked, args.target or ["sm_90"])
    if args.target:
        raise OptionError("--target belongs to `tilewright kernels report`")
    if asked:
        rows = [r for r in rows if r["op"] in asked]
    lines = [
        f"{row['op']}  " + "  ".join(f"{k}: {v}" for k, v in row.items() if k != "op" and v) for row in rows
    ]
    return Result(rows, lines)


def _report(ops: list[str], archs: list[str]) -> Result:
    from tilewright.compiler.diagnostics import OptionError, nearest
    from tilewright.frontends.commands.shared import step
    from tilewright.frontends.kernel_report import (
        ASSUMPTIONS,
        REPORTED,
        flex_rows,
        kernel_rows,
        notes,
        plain_flash_rows,
    )

    known = [target.arch for target in REPORTED]
    for arch in archs:
        if arch not in known:
            raise OptionError(f"--target {arch}", remedy=nearest(arch, known))
    with step("compiling"):
        beside = [*plain_flash_rows(archs), *flex_rows(archs)]
        rows = [*beside, *kernel_rows(ops or ["block_sparse_attention"], archs)]
    said = [ASSUMPTIONS, *notes(archs)]
    return Result(
        {"assumptions": ASSUMPTIONS, "notes": said[1:], "kernels": rows}, [*map(_line, rows), *said]
    )


def _line(row: dict[str, Any]) -> str:
    text = (
        f"{row['kernel']}  {row['target']}  warps {row['warps']}  "
        f"registers {row['registers']}  spills {row['spill_bytes']} B  shared {row['shared_bytes']} B  "
        f"occupancy {row['occupancy']:.0%} ({row['occupancy_limit']})  "
        f"loop {row['loop_instructions']} instructions: tensor core {row['tensor_core_share']:.1%}, "
        f"memory {row['memory_share']:.1%}"
    )
    if row.get("configuration", "") not in row["target"]:
        text += f"  configuration of {row['configuration']}"
    found = row.get("roofline")
    if found is None:
        return text
    per_flop, bound = found["bytes_per_flop"], found["bound"]
    return f"{text}  {per_flop:.4f} bytes/flop  roofline {found['microseconds']:.1f} us ({bound})"
