"""Regions that only switch autograd or autocast become plain nodes of the graph they stand in."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from tilewright.compiler.graph import output_node

_GRAD_SWITCH = torch._C._set_grad_enabled


def inline_regions(gm: fx.GraphModule, *, training: bool) -> Counter[str]:
    """Inline `wrap_with_set_grad_enabled` and disabled `wrap_with_autocast` calls and drop gradient switches.

    In training gradient switches and regions stay, since autograd reads them. Returns counts by rule.
    """
    counts: Counter[str] = Counter()
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _GRAD_SWITCH and not training:
            gm.graph.erase_node(node)
            counts["drop-grad-switch"] += 1
        elif (found := _body(gm, node, training)) is not None:
            counts.update(inline_regions(found[0], training=training))
            _inline(gm, node, *found)
            counts["inline-region"] += 1
    return counts


def _body(gm: fx.GraphModule, node: fx.Node, training: bool) -> tuple[fx.GraphModule, tuple[Any, ...]] | None:
    """The body of a region that may be inlined, and its arguments; None for everything else."""
    name = getattr(node.target, "__name__", "")
    if name == "wrap_with_set_grad_enabled" and not training:
        at = 1
    elif name == "wrap_with_autocast" and node.args[2] is False:
        at = 4
    else:
        return None
    owner = node.args[at]
    body = getattr(gm, str(owner.target), None) if isinstance(owner, fx.Node) else None
    if not isinstance(body, fx.GraphModule) or node.kwargs:
        return None
    return body, node.args[at + 1 :]


def _inline(gm: fx.GraphModule, node: fx.Node, body: fx.GraphModule, args: tuple[Any, ...]) -> None:
    """Copy the nodes of a body in front of a call of it, let the call's users read them, erase the call."""
    inside: dict[fx.Node, Any] = {}
    given = iter(args)
    results: Any = output_node(body.graph).args[0]
    with gm.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                inside[inner] = next(given)
            elif inner.op == "get_attr":
                inside[inner] = gm.graph.get_attr(_adopt(gm, body, str(inner.target)))
                inside[inner].meta = dict(inner.meta)
            elif inner.op != "output":
                inside[inner] = gm.graph.node_copy(inner, lambda n: inside[n])
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(inside[results])
    else:
        for user in list(node.users):
            user.replace_all_uses_with(inside[results[user.args[1]]])
            gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _adopt(gm: fx.GraphModule, body: fx.GraphModule, name: str) -> str:
    """Make an attribute of a body an attribute of the graph around it, under a free name."""
    value: Any = body
    for part in name.split("."):
        value = getattr(value, part)
    if getattr(gm, name, None) is value:
        return name
    free = f"{name.replace('.', '_')}_inlined"
    while hasattr(gm, free):
        free += "_"
    setattr(gm, free, value)
    return free
