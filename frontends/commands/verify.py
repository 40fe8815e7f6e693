"""`tilewright verify DIR`: is an exported artifact as the export left it?"""

from __future__ import annotations

import argparse
from pathlib import Path

from tilewright.frontends.cli import ANSWER_IS_NO, OK, Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="what `tilewright export` wrote")


def run(args: argparse.Namespace) -> Result:
    from tilewright.frontends.export.artifact import faults, read_manifest

    folder = Path(args.folder)
    found = faults(folder)
    files = read_manifest(folder)["files"]
    data = {"folder": str(folder), "files": len(files), "faults": found}
    if found:
        return Result(data, found, ANSWER_IS_NO)
    models = [name for name in files if name.endswith(".onnx")]
    if models:
        from tilewright.frontends.export.onnx_check import check_external_data

        for name in models:
            check_external_data(folder / name)
    size = sum(record["bytes"] for record in files.values())
    return Result(data, [f"{folder}: {len(files)} files, {size / 1e6:.1f} MB, as exported"], OK)
