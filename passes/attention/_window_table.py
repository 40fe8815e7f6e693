"""Window tables: a JSON file with one window per (step, layer, head) and the model it was searched on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilewright.compiler import Program
from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.program import InputKind
from tilewright.compiler.tiles import Triple

MAX_BYTES = 64 << 20
_KEYS = ("grid", "tile", "heads", "layers", "checkpoint")


@dataclass(frozen=True)
class WindowTable:
    """The windows of one step, by layer and head, and what they were searched for."""

    fingerprint: Mapping[str, Any]
    windows: Mapping[tuple[int, int], Triple]

    def heads(self, layer: int, heads: int) -> tuple[Triple, ...] | str:
        """The windows of a layer's heads, or why there are none."""
        missing = [h for h in range(heads) if (layer, h) not in self.windows]
        if missing:
            return f"the window table has no entry for layer {layer} head {missing[0]}"
        return tuple(self.windows[layer, h] for h in range(heads))


def read_table(path: str, step: int) -> WindowTable:
    """The table's row of a step; OptionError for a file that is no table, naming what is wrong.

    `{"fingerprint": {"grid": [T, Y, X], "tile": [t, y, x], "heads": H, "layers": L, "checkpoint": "..."},
    "windows": {"step_layer_head": [wt, wy, wx]}}`.
    """
    fingerprint, windows = _read(path)
    row = {(layer, head): value for (at, layer, head), value in windows.items() if at == step}
    if not row:
        raise _wrong(path, f"it has no entry for step {step}")
    return WindowTable(fingerprint, row)


def table_rows(path: str) -> dict[int, Hashable]:
    """The steps of a table, with values that are equal where their windows are; OptionError as above."""
    rows: dict[int, list[tuple[tuple[int, int], Triple]]] = {}
    for (step, layer, head), window in sorted(_read(path)[1].items()):
        rows.setdefault(step, []).append(((layer, head), window))
    return {step: tuple(row) for step, row in rows.items()}


def parse_windows(entries: Mapping[str, Any]) -> dict[tuple[int, int, int], Triple]:
    """`{"step_layer_head": [wt, wy, wx]}` as numbers; ValueError says which entry is none."""
    windows: dict[tuple[int, int, int], Triple] = {}
    for key, value in entries.items():
        numbers = key.split("_")
        if len(numbers) != 3 or not all(n.isascii() and n.isdecimal() for n in numbers):
            raise ValueError(f"entry {key[:40]!r}: expected step_layer_head")
        if not isinstance(value, list) or len(value) != 3 or not all(type(n) is int for n in value):
            raise ValueError(f"window of {key}: expected three whole numbers")
        step, layer, head = map(int, numbers)
        windows[step, layer, head] = (value[0], value[1], value[2])
    return windows


def read_json(path: str) -> Any:
    """A JSON file of at most MAX_BYTES; ValueError where it is none."""
    try:
        file = Path(path)
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not a readable JSON file: {error}") from None


def _wrong(path: str, problem: str) -> OptionError:
    return OptionError(f"sliding-tile-attention: option 'table' = {path!r}: {problem}")


def _read(path: str) -> tuple[Mapping[str, Any], dict[tuple[int, int, int], Triple]]:
    """(fingerprint, windows by step, layer and head)."""
    try:
        data = read_json(path)
        if not isinstance(data, dict) or not isinstance(data.get("windows"), dict):
            raise ValueError('expected {"fingerprint": {...}, "windows": {...}}')
        fingerprint = data.get("fingerprint")
        if not isinstance(fingerprint, dict) or any(key not in fingerprint for key in _KEYS):
            raise ValueError(
                f"its fingerprint must hold {', '.join(_KEYS)}: a table fits one model and one grid"
            )
        return fingerprint, parse_windows(data["windows"])
    except ValueError as error:
        raise _wrong(path, str(error)) from None


def checkpoint_of(program: Program) -> str:
    """16 hexadecimal digits that tell one set of weights from another: names, shapes and sampled values."""
    digest = hashlib.sha256()
    rows = sorted(
        (spec.source or spec.name, value)
        for spec, value in zip(program.inputs, program.example_inputs, strict=True)
        if spec.kind is InputKind.WEIGHT and isinstance(value, torch.Tensor)
    )
    for name, value in rows:
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].to(torch.float64).cpu()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def mismatch(table: WindowTable, program: Program, found: Mapping[str, Any]) -> str | None:
    """Why a table is not for this program, None when it is."""
    for key in ("grid", "tile", "heads"):
        if table.fingerprint[key] != found[key]:
            return f"the window table is for {key} {table.fingerprint[key]}, here it is {found[key]}"
    layers = program.facts.get("layers") if program.facts.has("layers") else table.fingerprint["layers"]
    if table.fingerprint["layers"] != layers:
        return f"the window table is for {table.fingerprint['layers']} layers, the model has {layers}"
    here = checkpoint_of(program)
    if table.fingerprint["checkpoint"] != here:
        searched = table.fingerprint["checkpoint"]
        return f"the window table is for checkpoint {searched!r}, these weights are {here!r}"
    return None
