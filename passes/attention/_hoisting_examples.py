"""Small transformers whose attentions share a token order, or do not."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler import ops
from tilewright.compiler.block_layout import BlockLayout

TOKENS, VIDEO, HEADS = 14, 12, 2
ORDER = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13]
"""Tiles of 2 x 2 on a 2 x 6 grid, then two tokens of text."""


def _layout(order: list[list[int]], whole: bool) -> BlockLayout:
    """Tiles attend themselves and their neighbours, text everything."""
    borders = [*itertools.accumulate([4, 4, 4, 2], initial=0)]
    near = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    groups = (near | whole).expand(len(order), -1, -1)
    heads = torch.arange(HEADS)[None] % len(order)
    layout = BlockLayout.from_block_mask(groups, borders, borders, HEADS, head_group=heads)
    source = torch.tensor(order, dtype=torch.int32)
    return layout.with_(src_q=source, src_k=source)


def _numbers(order: list[list[int]], whole: bool = False) -> list[tuple[list, torch.dtype] | None]:
    """The op's layout arguments as lists, so that a traced program can make them its constants."""
    given = _layout(order, whole).arguments()
    return [(a.tolist(), a.dtype) if isinstance(a, Tensor) else None for a in given]


SHARED = _numbers([ORDER])
PER_HEAD = _numbers([ORDER, list(range(TOKENS))])
OTHER = _numbers([[*ORDER[4:8], *ORDER[:4], *ORDER[8:]]])


def _constants(numbers: list[tuple[list, torch.dtype] | None]) -> list[Any]:
    """The layout arguments as tensors made inside the program; queries and keys share one index map."""
    made: list[Any] = [torch.tensor(n[0], dtype=n[1]) if n is not None else None for n in numbers]
    made[6], made[11] = [], made[10]
    return made


def _attend(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, layout: list) -> Tensor:
    """One layer: rotary embedding on the video tokens of q and k."""
    heads = ops.linear(ops.layer_norm(x, [8]), weight).reshape(2, TOKENS, HEADS, 4)
    turned = torch.cat((ops.rope(heads[:, :VIDEO], cos, sin), heads[:, VIDEO:]), 1).transpose(1, 2)
    out = ops.block_sparse_attention(turned, turned, heads.transpose(1, 2), *layout, None)[0]
    result: Tensor = x + out.transpose(1, 2).reshape(2, TOKENS, 8)
    return result


def two_layers(x: Tensor, cos: Tensor, sin: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    layout = _constants(SHARED)
    x = _attend(_attend(x, cos, sin, w1, layout), cos, sin, w2, layout)
    frames: Tensor = ops.linear(x[:, :VIDEO], w3).reshape(2, 2, 6, 8)
    return frames.cumsum(2)


def one_layer(x: Tensor, cos: Tensor, sin: Tensor, w1: Tensor) -> Tensor:
    return _attend(x, cos, sin, w1, _constants(SHARED))


def mixing_model(x: Tensor, cos: Tensor, sin: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Between the layers tokens are summed up along the sequence."""
    layout = _constants(SHARED)
    return _attend(_attend(x, cos, sin, w1, layout).cumsum(1), cos, sin, w2, layout)


def per_head(x: Tensor, cos: Tensor, sin: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    layout = _constants(PER_HEAD)
    return _attend(_attend(x, cos, sin, w1, layout), cos, sin, w2, layout)


def two_orders(x: Tensor, cos: Tensor, sin: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The second layer has an order of its own."""
    x = _attend(x, cos, sin, w1, _constants(SHARED))
    return _attend(x, cos, sin, w2, _constants(OTHER))


DENSE = _numbers([ORDER], whole=True)


def two_dense_layers(x: Tensor, cos: Tensor, sin: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Every block is listed, so that correcting what is missing changes nothing."""
    layout = _constants(DENSE)
    return _attend(_attend(x, cos, sin, w1, layout), cos, sin, w2, layout)


def computed_groups(x: Tensor, cos: Tensor, sin: Tensor, w1: Tensor, w2: Tensor, of: Tensor) -> Tensor:
    """The heads' groups are computed in the call."""
    layout = _constants(PER_HEAD)
    layout[4] = (of > 0).to(torch.int32)
    return _attend(_attend(x, cos, sin, w1, layout), cos, sin, w2, layout)
