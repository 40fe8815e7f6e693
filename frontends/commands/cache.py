"""`tilewright cache`: the store of compiled kernels."""

from __future__ import annotations

import argparse
import json

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cli import ANSWER_IS_NO, OK, Result
from tilewright.runtime.store import ArtifactStore

ACTIONS = ("where", "size", "list", "verify", "clear", "why-miss")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", nargs="?", default="where", help=f"one of {', '.join(ACTIONS)} (default where)"
    )
    parser.add_argument("key", nargs="?", help="for why-miss: the key as a JSON object of texts")


def run(args: argparse.Namespace) -> Result:
    if args.action not in ACTIONS:
        raise OptionError(f"cache action {args.action!r}: expected one of {', '.join(ACTIONS)}")
    store = ArtifactStore.default()
    if args.action == "clear":
        count = len(list(store.entries()))
        store.clear()
        return Result({"removed": count}, [f"removed {count} entries"])
    if args.action == "verify":
        problems = [str(p) for p in store.verify()]
        return Result(
            {"problems": problems}, problems or ["every entry is intact"], ANSWER_IS_NO if problems else OK
        )
    if args.action == "why-miss":
        return _why_miss(store, args.key)
    entries = list(store.entries())
    if args.action == "list":
        rows = [{"digest": e.digest, "bytes": e.size, "key": dict(e.key)} for e in entries]
        return Result(rows, [f"{e.digest[:16]}  {e.size:>9} bytes  {e.key.get('op', '')}" for e in entries])
    data = {"root": str(store.root), "entries": len(entries), "bytes": store.size()}
    return Result(data, [f"{data['root']}: {data['entries']} entries, {data['bytes']} bytes"])


def _why_miss(store: ArtifactStore, text: str | None) -> Result:
    try:
        key = json.loads(text or "")
    except ValueError:
        key = None
    if not isinstance(key, dict) or not all(isinstance(v, str) for v in key.values()):
        raise OptionError("why-miss needs the key as a JSON object of texts", remedy='\'{"op": "rms_norm"}\'')
    differences = [str(d) for d in store.why_miss(key)]
    return Result({"differences": differences}, differences or ["the entry is there"])
