"""Folds what only renames axes: a decode step of one token is full of it, and every node costs a dispatch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from onnx import NodeProto, helper
from torch import Tensor

from tilewright.frontends.export.onnx_graph import OnnxGraph

Shape = tuple[int, ...]


def fold_reshapes(g: OnnxGraph, kept: Collection[str]) -> None:
    """Rewrite chains of Reshape, and of Transpose that moves axes of size 1 only, as one Reshape of their
    first input, or as that input; then drop what nobody reads. kept: values that must keep their names.
    Values whose sizes only the call knows stay as they are."""
    known, source, alias = dict(_shapes(g)), dict[str, str](), dict[str, str]()
    nodes = list[NodeProto]()
    for node in g.nodes:
        for i, name in enumerate(node.input):
            node.input[i] = alias.get(name, name)
        target = _renamed(g, node, known)
        if target is None:
            nodes.append(node)
            continue
        given, made = node.input[0], node.output[0]
        known[made], source[made] = target, source.get(given, given)
        if known.get(source[made]) == target and made not in kept:
            alias[made] = source[made]
        else:
            inputs = [source[made], g.constant(list(target), torch.int64)]
            nodes.append(helper.make_node("Reshape", inputs, [made], name=made))
    g.nodes[:] = nodes
    drop_unread(g, kept)


def drop_unread(g: OnnxGraph, kept: Collection[str]) -> None:
    """Take out the nodes whose results nobody reads; kept: the results of the model."""
    read, live = set(kept), list[NodeProto]()
    for node in reversed(g.nodes):
        if read.intersection(node.output):
            read.update(node.input)
            live.append(node)
    g.nodes[:] = reversed(live)


def _shapes(g: OnnxGraph) -> Iterator[tuple[str, Shape]]:
    """Values whose sizes are known."""
    yield from g.sizes.items()
    for node, names in g.values.items():
        value: Any = node.meta.get("val")
        pairs = zip(names, value, strict=False) if isinstance(names, list) else [(names, value)]
        for name, tensor in pairs:
            if isinstance(tensor, Tensor) and all(isinstance(n, int) for n in tensor.shape):
                yield name, tuple(tensor.shape)


def _renamed(g: OnnxGraph, node: NodeProto, known: dict[str, Shape]) -> Shape | None:
    """The shape of what a node makes when it only renames axes of known sizes, None otherwise."""
    given = known.get(node.input[0]) if node.input else None
    if node.domain or given is None:
        return None
    if node.op_type == "Transpose":
        order = list(helper.get_attribute_value(node.attribute[0]))
        moved = [axis for axis in order if given[axis] != 1]
        return tuple(given[axis] for axis in order) if moved == sorted(moved) else None
    if node.op_type != "Reshape" or node.input[1] not in g.weights or math.prod(given) == 0:
        return None
    asked = [int(n) for n in g.weights[node.input[1]]]
    sizes = [given[i] if n == 0 else n for i, n in enumerate(asked)]
    if -1 in sizes:
        sizes[sizes.index(-1)] = math.prod(given) // -math.prod(sizes)
    return tuple(sizes)
