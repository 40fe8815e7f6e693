"""Chains in a program: results that nobody reads, and one value given twice."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx

from tilewright.compiler.repeats import Piece, cut
from tilewright.frontends.instances import _direct


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a + b, a * b


@pytest.mark.parametrize("read", [(0,), (1,), (0, 1)])
def test_a_call_alone_gives_what_is_read(read: tuple[int, ...]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_function(_pair, (x, x))
    results = [graph.call_function(operator.getitem, (call, i)) for i in read]
    graph.output(tuple(results))
    value = torch.randn(3)
    x.meta["val"] = value
    call.meta["val"] = _pair(value, value)
    for node, i in zip(results, read, strict=True):
        node.meta["val"] = call.meta["val"][i]
    pieces: list[Piece] = cut(graph, lambda node: node is call)
    assert [p.alone for p in pieces] == [True]
    assert pieces[0].inputs == (x, x)
    got = _direct(pieces[0])(value, value)
    for a, i in zip(got, read, strict=True):
        assert torch.equal(a, _pair(value, value)[i])
