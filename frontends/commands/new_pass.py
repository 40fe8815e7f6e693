"""`tilewright new-pass`: a pass file that passes its self-test as written."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cli import Result

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)+")
_TEMPLATE = '''"""{title}: say in one sentence what changes.

Replace the pattern, the condition and the replacement by yours; `tilewright passes {name} --self-test` tells.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tilewright.compiler import (
    ACCEPT,
    Exactness,
    Example,
    Match,
    Rewrite,
    Stage,
    Tensor,
    Verdict,
    refuse,
    rewrite_pass,
)


@rewrite_pass("{name}", stage=Stage.NORMALIZE, exactness=Exactness.BITWISE)
class {class_name}(Rewrite):
    """Drop a double negation.

    rewrite:
        -(-x)
     -> x * 1
    """

    near_miss_depth = 1

    @staticmethod
    def pattern(x):
        return torch.neg(torch.neg(x))

    def where(self, m: Match) -> Verdict:
        if not m.dtype("x").is_floating_point:
            return refuse(f"x is {{m.dtype('x')}}, not floating", at=m["x"])
        return ACCEPT

    def replacement(self, x):
        return x * 1

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        yield {{}}, Example(lambda x: -(-x) + 2, (Tensor(3, 5),))
        yield {{}}, Example(lambda x: -(-x), (Tensor(3, dtype=torch.int64),), refusal="not floating")
'''


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="kebab-case: verb-object, such as fuse-add-rmsnorm")
    parser.add_argument(
        "--folder", help="where to write it (default: the passes folder of this installation)"
    )


def run(args: argparse.Namespace) -> Result:
    from tilewright.compiler import registry

    if not _NAME.fullmatch(args.name):
        raise OptionError(
            f"pass name {args.name!r}", remedy="write it in kebab-case with a verb, such as fold-scales"
        )
    if args.name in registry.names():
        raise OptionError(f"pass {args.name!r} exists already")
    folder = (
        Path(args.folder) if args.folder else Path(__file__).resolve().parents[2] / "passes" / "normalize"
    )
    path = folder / f"{args.name.replace('-', '_')}.py"
    words = args.name.split("-")
    text = _TEMPLATE.format(
        name=args.name,
        title=args.name.replace("-", " ").capitalize(),
        class_name="".join(w.capitalize() for w in words),
    )
    _write_new(path, text)
    return Result(
        {"path": str(path), "name": args.name},
        [f"wrote {path}", f"next: tilewright passes {args.name} --self-test"],
    )


def _write_new(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.link(temporary, path)
    except FileExistsError:
        raise OptionError(f"{path} exists already", remedy="choose another name or remove the file") from None
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror}", remedy="give --folder") from error
    finally:
        temporary.unlink(missing_ok=True)
