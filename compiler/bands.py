"""Bands: attention to the keys near a query in some token order, as widths and exact densities.

Frame by frame in another order a band is what Sparse VideoGen (arXiv:2502.01776) and Re-ttention
(arXiv:2505.22918) attend.
"""

from __future__ import annotations

import math
from fractions import Fraction

from tilewright.compiler.diagnostics import OptionError


def band_pairs(tokens: int, width: int) -> int:
    """Pairs (i, j) of `tokens` tokens with |i - j| <= width."""
    width = min(width, tokens - 1)
    return tokens * (2 * width + 1) - width * (width + 1)


def band_density(tokens: int, width: int) -> Fraction:
    """The share of all pairs that a band keeps, exactly."""
    return Fraction(band_pairs(tokens, width), tokens * tokens)


def width_in_frames(density: float, *, tokens: int, text: int, frame: int) -> float:
    """Width of the band, in frames, at which a whole attention has the given density.

    tokens: video and text; text rows and columns are dense and count; frame: tokens of one frame. Sparse
    VideoGen's command line calls the density a sparsity. OptionError when text alone needs more than it.
    """
    if not 0.0 < density <= 1.0:
        raise OptionError(f"density = {density}: expected more than 0 and at most 1")
    video = (density * tokens**2 - 2 * tokens * text) / tokens**2
    if video <= 0.0:
        raise OptionError(
            f"density = {density}: the {text} text tokens of {tokens} alone take {2 * text / tokens:.3g}"
        )
    return tokens * (1.0 - math.sqrt(1.0 - video)) / frame


def band_width(density: float, *, tokens: int, text: int, frame: int) -> int:
    """The same width in tokens, rounded to the nearest."""
    return round(width_in_frames(density, tokens=tokens, text=text, frame=frame) * frame)


def half_width(tokens: int, share: float) -> int:
    """Keys on either side of a query in a band of about `share` of `tokens` keys (Re-ttention)."""
    if not 0.0 < share <= 1.0:
        raise OptionError(f"share = {share}: expected more than 0 and at most 1")
    return math.floor(math.floor(tokens * share) / 2)


def with_text(video: Fraction, *, tokens: int, text: int) -> Fraction:
    """Density over all pairs when video has density `video` within itself and text attends and is attended
    by everything; `tokens` counts video only."""
    total = tokens + text
    return (video * tokens**2 + 2 * tokens * text + text**2) / total**2
