"""Autocast entered inside a captured model: one that changes nothing is dropped, one that casts is an error.

Dynamo keeps `with torch.autocast(...)` as a pair of calls around the region. Passes move ops freely, so a
region whose meaning depends on the pair cannot stay in a program.
"""

from __future__ import annotations

import warnings

import torch
from torch import fx

from tilewright.compiler.diagnostics import CaptureError


def drop_inert_autocast(flat: fx.GraphModule) -> None:
    """Erase enter and exit calls of autocast regions that cast nothing; CaptureError for any other.

    A region is inert when autocast is off around the model and inside the region: `enabled=False`, or a dtype
    that the device has no autocast for (float32 on a CPU), which torch disables with a warning.
    """
    enters = [n for n in flat.graph.nodes if n.target is torch.amp.autocast_mode._enter_autocast]
    for enter in enters:
        device, dtype, enabled, cached = enter.args
        if torch.is_autocast_enabled(device) or _casts(device, dtype, enabled, cached):
            raise CaptureError(
                f"{enter.name}: the model enters autocast({device!r}, {dtype}) itself",
                remedy="enter autocast around the call of the compiled model, or cast the model",
            )
        for leave in list(enter.users):
            flat.graph.erase_node(leave)
        flat.graph.erase_node(enter)
    if enters:
        flat.recompile()


def _casts(device: str, dtype: torch.dtype | None, enabled: bool, cached: bool) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.amp.autocast_mode.autocast(device, dtype, enabled, cached)._enabled
