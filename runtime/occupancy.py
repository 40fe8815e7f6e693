"""How many warps of a compiled kernel a multiprocessor holds, from the vendors' tables of limits."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.runtime.contracts import Target
from tilewright.runtime.offline import Resources

_WARP = {"cuda": 32, "hip": 64}
_NVIDIA_REGISTERS, _NVIDIA_GRAIN, _BLOCK_OVERHEAD = 65536, 256, 1024
"""32-bit registers of a multiprocessor, the grain in which a warp takes them, shared bytes a block costs."""
_NVIDIA = {
    "sm_80": (64, 32, 164), "sm_89": (48, 24, 100), "sm_90": (64, 32, 228),
    "sm_100": (64, 32, 228), "sm_120": (48, 24, 100),
}  # fmt: skip
"""Most warps, most blocks, KiB of shared memory of a multiprocessor (CUDA programming guide)."""
_AMD_LANES, _AMD_WAVES, _AMD_SIMDS, _AMD_GRAIN = 512, 8, 4, 8
"""Vector registers of a lane, most waves of a SIMD unit, SIMD units of a compute unit (CDNA3 ISA)."""
_AMD_SHARED = {"gfx942": 64, "gfx950": 160}


@dataclass(frozen=True)
class Occupancy:
    """Share of the most warps that a multiprocessor can hold, and what sets it."""

    share: float
    """0 for a kernel that cannot be launched."""
    limit: str
    """`registers`, `shared memory`, `blocks` or `warps`."""


def occupancy(used: Resources, warps: int, target: Target) -> Occupancy:
    """Occupancy of blocks of `warps` warps."""
    if used.over_limit(target):
        return Occupancy(0.0, "shared memory")
    if target.kind == "hip":
        return _amd(used, warps, target)
    most, blocks, shared = _NVIDIA[target.arch]
    per_warp = -(-used.registers * _WARP["cuda"] // _NVIDIA_GRAIN) * _NVIDIA_GRAIN
    fits = {
        "registers": _NVIDIA_REGISTERS // max(per_warp, 1) // warps,
        "shared memory": shared * 1024 // (used.shared_bytes + _BLOCK_OVERHEAD),
        "blocks": blocks,
        "warps": most // warps,
    }
    return _least(fits, warps, most)


def _amd(used: Resources, warps: int, target: Target) -> Occupancy:
    most = _AMD_WAVES * _AMD_SIMDS
    per_lane = max(_AMD_GRAIN, -(-used.registers // _AMD_GRAIN) * _AMD_GRAIN)
    waves = min(_AMD_WAVES, _AMD_LANES // per_lane) * _AMD_SIMDS
    fits = {"registers": waves // warps, "warps": most // warps}
    if used.shared_bytes:
        fits["shared memory"] = _AMD_SHARED[target.arch] * 1024 // used.shared_bytes
    return _least(fits, warps, most)


def _least(fits: dict[str, int], warps: int, most: int) -> Occupancy:
    limit = min(fits, key=lambda name: fits[name])
    return Occupancy(fits[limit] * warps / most, limit)
