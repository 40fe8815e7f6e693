"""Semantic ops: what Tilewright matches and rewrites. One file per op family declares them here.

A semantic op is a torch op in the `tilewright` namespace whose CompositeImplicit implementation is the
obvious PyTorch definition. The definition *is* the meaning: eager runs it, fake tensors take their shapes
from it, autograd differentiates it, and lowering falls back to it where no kernel fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NAMESPACE = "tilewright"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Flops = Callable[..., Any]


@dataclass(frozen=True)
class SemanticOp:
    """One semantic op: its schema, its definition and its symbolic arithmetic."""

    name: str
    schema: str
    definition: Callable[..., Any]
    """Plain PyTorch: the oracle of every kernel and the fallback of lowering."""
    flops: Flops
    """flops(*args, out): args hold fake tensors or constants; sizes may be SymInt. Multiply-add counts 2."""
    lowers_to: str = ""
    """Name of the one aten overload that means the same (`linear.default`), empty when there is none."""
    opaque: bool = False
    """The call itself is the fallback of lowering: the definition reads data and is never traced through."""

    @property
    def overload(self) -> torch._ops.OpOverload:
        overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        return overload


_OPS: dict[str, SemanticOp] = {}


def define(
    schema: str,
    *,
    flops: Flops,
    lowers_to: str = "",
    fake: Callable[..., Any] | None = None,
    backward: tuple[Callable[..., None], Callable[..., Any]] | None = None,
) -> Callable[[Callable[..., Any]], SemanticOp]:
    """Declare a semantic op from its torch schema and its definition; returns the `SemanticOp`.

    With `fake` the op is opaque: fake tensors take their shapes from that function, autograd from `backward`
    (setup_context, formula; None: not differentiable), and tracing never looks inside.
    """

    def declare(definition: Callable[..., Any]) -> SemanticOp:
        name = schema.split("(", 1)[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        if fake is None:
            _LIBRARY.impl(name, definition, "CompositeImplicitAutograd")
        else:
            _LIBRARY.impl(name, definition, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        if backward is not None:
            setup, formula = backward
            torch.library.register_autograd(
                f"{NAMESPACE}::{name}", formula, setup_context=setup, lib=_LIBRARY
            )
        op = SemanticOp(name, schema, definition, flops, lowers_to, fake is not None)
        _OPS[name] = op
        return op

    return declare


def semantic_op(target: object) -> SemanticOp | None:
    """The semantic op behind a graph node's target, or None."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        return _OPS.get(target._schema.name.split("::")[1])
    return None


def all_ops() -> dict[str, SemanticOp]:
    """Every declared semantic op by name."""
    return dict(_OPS)
