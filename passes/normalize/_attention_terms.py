"""The links of spelled-out attention as pattern terms, and what their constants mean."""

from __future__ import annotations

import math
from typing import Any

import torch

from tilewright.compiler import either, free, known_equal, number

aten = torch.ops.aten

LOWEST = -1e30
"""Scores filled with this or less leave nothing of the score in float32 and bfloat16: adding it is the
same."""


def _times(choice: str, x: Any, constant: str) -> Any:
    """`x`, `x * constant` or `x / constant`."""
    return either(choice, mul=x * number(constant), div=x / number(constant), none=x)


def _regroup(choice: str, x: Any, sizes: str) -> Any:
    return either(choice, reshape=aten.reshape(x, free(sizes)), view=aten.view(x, free(sizes)), none=x)


def product(q: Any, kt: Any, bias: Any) -> Any:
    """q k^T: `matmul`, `bmm`, or `baddbmm` that adds a bias; q or k may be scaled before."""
    left = _times("scale_q", q, "by_q")
    transposed = either(
        "key", permute=aten.permute(kt, free("order")), transpose=aten.transpose(kt, -1, -2), none=kt
    )
    right = _times("scale_k", transposed, "by_k")
    inner = _times("scale_k_inner", kt, "by_k_inner")
    right = either("key_scale", outside=right, inside=aten.permute(inner, free("order")))
    return either(
        "product",
        matmul=aten.matmul(left, right),
        bmm=aten.bmm(left, right),
        baddbmm=aten.baddbmm(bias, left, right, beta=number("beta"), alpha=number("alpha")),
    )


def _capped(x: Any) -> Any:
    """c * tanh(x / c)."""
    return either("cap", tanh=aten.tanh(x / number("softcap")) * number("softcap"), none=x)


def _masked(step: str, x: Any, mask: Any) -> Any:
    """One masking step; the fill value is bound to `fill_<step>`."""
    fill = number(f"fill_{step}")
    steps = {
        "fill": aten.masked_fill(x, mask, fill),
        "keep": aten.where(mask, x, fill),
        "drop": aten.where(mask, fill, x),
        "add": x + mask,
    }
    # A single step is the first one.
    return either(f"mask_{step}", none=x, **steps) if step == "2" else either(f"mask_{step}", **steps, none=x)


def scores(q: Any, kt: Any, factor: Any, bias: Any, mask: Any, mask2: Any) -> Any:
    """Everything before the softmax."""
    x = product(q, kt, bias)
    x = either("scale", mul=x * number("by"), div=x / number("by"), tensor=x * factor, none=x)
    x = either("early", add=_capped(x) + bias, none=_capped(x))
    x = _regroup("regroup", x, "sizes")
    x = either("wide_early", cast=aten.to.dtype(x, free("wide_dtype")), none=x)
    x = _masked("2", _masked("1", x, mask), mask2)
    x = either("clamp", maximum=aten.max(x, number("floor")), none=x)
    x = _times("late", x, "by_late")
    x = _regroup("regroup_back", x, "sizes_back")
    return either("wide", cast=aten.to.dtype(x, free("wide_dtype")), none=x)


def probabilities(x: Any) -> Any:
    """softmax over the last axis, cast back, dropout of probability zero, regrouped."""
    p = either(
        "softmax",
        int=aten.softmax(x, -1, free("softmax_dtype")),
        raw=aten._softmax(x, -1, free("half_to_float")),
    )
    p = either("down", cast=aten.to.dtype(p, free("down_dtype")), none=p)
    p = _regroup("regroup_early", p, "sizes_early")
    p = either("drop", dropout=aten.dropout(p, number("rate"), free("train")), none=p)
    return _regroup("regroup_last", p, "sizes_last")


def sink_probabilities(x: Any, sinks: Any) -> Any:
    """softmax over the keys and one learned logit per head, that logit's column dropped."""
    column = aten.expand(aten.reshape(sinks, free("sink_shape")), free("sink_sizes"))
    joined = aten.cat([x, column], -1)
    shifted = either(
        "shift",
        max=joined - aten.max(joined, -1, True)[0],
        amax=joined - aten.amax(joined, [-1], True),
        none=joined,
    )
    p = aten.softmax(shifted, -1, free("softmax_dtype"))
    p = aten.slice(p, -1, free("sink_start"), free("sink_end"), 1)
    p = either("down", cast=aten.to.dtype(p, free("down_dtype")), none=p)
    return either("drop", dropout=aten.dropout(p, number("rate"), free("train")), none=p)


def scale_of(get: Any) -> float:
    """The product of all constant factors; `get` looks up a bound constant by name."""
    scale = 1.0
    for form, constant in (
        ("scale_q", "by_q"),
        ("scale_k", "by_k"),
        ("scale_k_inner", "by_k_inner"),
        ("scale", "by"),
        ("late", "by_late"),
    ):
        if get(form) == "mul":
            scale *= get(constant)
        elif get(form) == "div":
            scale /= get(constant)
    return float(scale * (get("alpha") if get("product") == "baddbmm" else 1.0))


def late_of(get: Any) -> float:
    """What the scores are multiplied with after the mask."""
    return float({"mul": get("by_late"), "div": 1.0 / (get("by_late") or 1.0)}.get(get("late"), 1.0))


def key_of(kt: torch.Tensor, get: Any) -> torch.Tensor:
    """k [..., T, D] from what was multiplied as k^T: a transposition that was there is undone, not
    repeated."""
    form = get("key") if get("key_scale") == "outside" else "permute"
    if form == "transpose":
        return kt
    if form == "permute":
        order = list(get("order"))
        order[-1], order[-2] = order[-2], order[-1]
        return kt if order == list(range(len(order))) else kt.permute(order)
    return kt.transpose(-1, -2)


def last_two_kept(sizes: Any, rows: Any, columns: Any) -> bool:
    """True when a regrouping to `sizes` leaves the last two axes alone."""
    if len(sizes) < 2 or any(not isinstance(s, (int, torch.SymInt)) for s in sizes):
        return False
    unknown = [i for i, s in enumerate(sizes) if isinstance(s, int) and s == -1]
    if any(i >= len(sizes) - 2 for i in unknown):
        return False
    return known_equal(sizes[-2], rows) and known_equal(sizes[-1], columns)


def one_mask(
    masks: list[tuple[str, torch.Tensor, float | None]], dtype: torch.dtype, late: float, floor: float | None
) -> torch.Tensor | None:
    """The masking steps as one mask: bool (True is kept) where that says it all, else added to the scores.

    masks: (how, mask, fill value) in order, how being add, fill (True is filled), keep (False is filled)
    or drop.
    """
    if not masks:
        return None
    if len(masks) == 1 and masks[0][0] != "add" and masks[0][2] == -math.inf:
        how, mask, _ = masks[0]
        return mask if how == "keep" else torch.logical_not(mask)
    total: torch.Tensor | None = None
    for how, mask, value in masks:
        if how == "add":
            total = mask if total is None else total + mask
            continue
        assert value is not None, "a fill has a value"
        drop = torch.logical_not(mask) if how == "keep" else mask
        base = torch.zeros((), dtype=dtype, device=mask.device) if total is None else total
        total = torch.where(drop, value, base)
    assert total is not None
    if floor is not None:
        total = torch.clamp(total, min=floor)
    return total if late == 1.0 else total * late
