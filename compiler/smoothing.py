"""Scales that move magnitude from activation channels into weights, and the places where they cancel.

Source: SmoothQuant (arXiv:2211.10438). s = A^alpha / Wmax^(1 - alpha) per channel, A the channel's largest
magnitude on sample data and Wmax its largest weight over all layers that read it; x / s and W s give the same
product. x / s costs nothing where something before it is linear in each channel: the gain of a norm, or the
up projection of a gated MLP (never its gate, which goes through the activation).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from tilewright.compiler import ops
from tilewright.compiler.basis import Blocked
from tilewright.compiler.dataflow import see_through
from tilewright.compiler.program import Program
from tilewright.compiler.schema import arguments

EPSILON = 1e-5
"""Smallest magnitude that A and Wmax count as."""


SMOOTHED = "tw_smoothed"
"""Node metadata: the channels of this value have been scaled."""


@dataclass(frozen=True)
class Site:
    """One place: `source` takes 1 / s (a norm, or an up projection), `readers` take s."""

    source: fx.Node
    readers: tuple[fx.Node, ...]


def norm_site(program: Program, norm: fx.Node) -> Site | Blocked:
    """A norm with a gain whose only users are linear layers."""
    given = arguments(norm)
    if given["weight"] is None:
        return Blocked(norm, "it has no gain to hold the scales")
    for name in ("weight", "bias"):
        value = given.get(name)
        if value is not None and not program.is_constant(value):
            return Blocked(value, f"its {name} {value.name} is computed, not a weight")
    if len(given.get("normalized_shape", (1,))) != 1:
        return Blocked(norm, f"it normalises {len(given['normalized_shape'])} axes, a linear reads one")
    return _site(program, norm, norm)


def hidden_site(program: Program, hidden: fx.Node) -> Site | Blocked:
    """A gated MLP whose up projection feeds it alone."""
    up = see_through(arguments(hidden)["up"])
    if up.target is not ops.linear:
        return Blocked(up, f"its up operand {up.name} is no linear layer")
    if len(up.users) != 1 or arguments(hidden)["gate"] is arguments(hidden)["up"]:
        return Blocked(up, f"its up operand {up.name} has other readers")
    for name in ("weight", "bias"):
        value = arguments(up)[name]
        if value is not None and (not program.is_constant(value) or len(value.users) != 1):
            return Blocked(value, f"the {name} of {up.name} is computed or shared")
    return _site(program, up, hidden)


def _site(program: Program, source: fx.Node, value: fx.Node) -> Site | Blocked:
    if SMOOTHED in value.meta:
        return Blocked(value, "its channels are smoothed already")
    for user in value.users:
        if user.target is not ops.linear or arguments(user)["x"] is not value:
            return Blocked(user, f"{user.name} reads it and is not a linear layer")
        weight = arguments(user)["weight"]
        if not program.is_constant(weight) or len(weight.users) != 1:
            return Blocked(user, f"the weight of {user.name} is computed or shared")
    return Site(source, tuple(sorted(value.users)))


def scales(weights: tuple[Tensor, ...], largest: Tensor | None, alpha: float) -> Tensor:
    """s [K] in float64 for the readers' weights [N, K]; `largest` [K] is needed for alpha above 0.

    Computed from the weights each time, so that it stays right when they change.
    """
    top = weights[0].double().abs().amax(0)
    for weight in weights[1:]:
        top = torch.maximum(top, weight.double().abs().amax(0))
    found = top.clamp_min(EPSILON).pow(alpha - 1.0)
    if largest is not None and alpha > 0.0:
        found = found * largest.double().clamp_min(EPSILON).pow(alpha)
    return found


def apply_site(program: Program, site: Site, largest: Tensor | None, alpha: float, name: str) -> None:
    """Put 1 / s into the source and s into the readers, as derived weights; `name` marks the nodes."""
    weights = [arguments(reader)["weight"] for reader in site.readers]
    arguments(site.readers[0])["x"].meta[SMOOTHED] = True
    shared = partial(_edited, alpha=alpha, largest=largest)
    for reader, weight in zip(site.readers, weights, strict=True):
        given = arguments(reader)
        given["weight"] = program.derive(
            f"{program.path_of(weight)} smoothed",
            (weight, *weights),
            partial(shared, form="columns"),
            like=weight,
        )
        _set(reader, given, name)
    given = arguments(site.source)
    norm = site.source.target is not ops.linear
    offset = float(given.get("offset", 0.0))
    forms = {"weight": "gain" if norm else "rows", "bias": "gain"}
    for part, form in forms.items():
        value = given.get(part)
        if value is not None:
            shift = offset if part == "weight" else 0.0
            compute = partial(shared, form=form, offset=shift)
            smoothed = f"{program.path_of(value)} smoothed"
            given[part] = program.derive(smoothed, (value, *weights), compute, like=value)
    _set(site.source, given, name)


def _edited(
    value: Tensor, *weights: Tensor, form: str, alpha: float, largest: Tensor | None, offset: float = 0.0
) -> Tensor:
    s = scales(weights, largest, alpha)
    wide = value.double()
    if form == "columns":
        found = wide * s
    elif form == "rows":
        found = wide / s[:, None]
    else:
        found = (wide + offset) / s - offset
    return found.to(value.dtype)


def _set(node: fx.Node, given: dict[str, Any], name: str) -> None:
    node.args, node.kwargs = tuple(given.values()), {}
    node.meta["rewritten_by"] = (*node.meta.get("rewritten_by", ()), name)
