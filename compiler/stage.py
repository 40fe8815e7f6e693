"""Stages of a pipeline, exactness classes and slots of meaning."""

from __future__ import annotations

from enum import Enum, IntEnum


class Stage(IntEnum):
    """Where in a pipeline a pass belongs; a pipeline's stages never decrease."""

    NORMALIZE = 0
    STRUCTURE = 1
    """Skip, early exit, step reuse, token drop."""
    WEIGHTS = 2
    """Fold, smooth, rotate, quantize, sparsify."""
    ATTENTION = 3
    """Permute, layout, correction, precision."""
    MEMORY = 4
    """KV tiers, offload, prefetch."""
    PARALLEL = 5
    LOWER = 6
    """Fusions that exist for a kernel's sake."""


class Exactness(Enum):
    """How the rewritten program relates to the original."""

    BITWISE = "bitwise"
    """The same bits."""
    ROUNDING = "rounding"
    """The same real function, rounded in another order."""
    APPROXIMATE = "approximate"
    """Another function: the pass defines `reference` and an `exact_limit` that recovers the original."""


SLOTS = frozenset(
    {
        "attention.token_order",
        "attention.layout",
        "attention.correction",
        "attention.precision",
        "attention.cache_policy",
        "attention.placement",
        "linear.rotation",
        "linear.scale",
        "linear.width",
        "linear.weight_format",
        "linear.activation_format",
        "block.skip_policy",
    }
)
"""Meanings that have one owner per node; two passes that want the same slot of a node are a conflict."""
