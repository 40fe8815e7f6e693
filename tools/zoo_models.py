"""The model zoo: every architecture at a tiny size, with seeded weights, inputs and expected semantic ops."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache

from tilewright.tools import zoo_decoders, zoo_diffusion, zoo_encoders, zoo_state_space, zoo_vision
from tilewright.tools.zoo_entry import COUNTED, FAMILIES, Inputs, ZooEntry

__all__ = ["COUNTED", "FAMILIES", "Inputs", "ZooEntry", "entries", "select"]


@cache
def entries() -> tuple[ZooEntry, ...]:
    """Every entry, family by family."""
    found = (
        *zoo_decoders.entries(),
        *zoo_state_space.entries(),
        *zoo_encoders.entries(),
        *zoo_vision.entries(),
        *zoo_diffusion.entries(),
    )
    names = [entry.name for entry in found]
    double = {name for name in names if names.count(name) > 1}
    if double:
        raise ValueError(f"zoo entries named twice: {sorted(double)}")
    return found


def select(names: Sequence[str]) -> list[ZooEntry]:
    """Entries by name or family, in zoo order; all of them for no names. ValueError for an unknown name."""
    known = {entry.name for entry in entries()} | set(FAMILIES)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; --list prints them"
            raise ValueError(f"no zoo model or family {name!r}{hint}")
    return [entry for entry in entries() if not names or entry.name in names or entry.family in names]
