"""SageAttention (arXiv:2410.02367): the scores of a block-sparse attention from 8-bit codes of q and k.

Keys lose their mean over tokens first, which no softmax sees; queries and keys are then rounded with one
scale for 128 queries and for 64 keys of a head, at run time: to int8, or to e4m3 floats as FlashAttention-3
has it (arXiv:2407.08608). Values and probabilities keep their 16 bits. There are kernels for GPUs (fp8 for
sm_90, sm_100 and sm_120); elsewhere the op's definition runs, slower than the attention it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import torch

from tilewright.compiler import (
    Exactness,
    Example,
    GraphPass,
    PassLog,
    Program,
    Stage,
    Tensor,
    graph_pass,
    ops,
)
from tilewright.compiler.graph import insert_like
from tilewright.compiler.ops.quantized_attention import rounded_keys, rounded_queries
from tilewright.passes.attention import _hoisting_examples as small
from tilewright.passes.attention._sparse_call import insert_after

_CODES = {
    "int8": (ops.block_sparse_attention_int8, torch.int8),
    "fp8": (ops.block_sparse_attention_fp8, torch.float8_e4m3fn),
}
"""The op and the dtype of its codes."""


@graph_pass(
    "quantize-attention",
    stage=Stage.ATTENTION,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2410.02367",
    after=(
        "sliding-tile-attention",
        "spatial-temporal-attention",
        "adaptive-block-attention",
        "sparse-linear-attention",
        "hoist-token-permutation",
        "statistical-reshape",
    ),
    owns=("attention.precision",),
)
class QuantizeAttention(GraphPass):
    """Multiply queries and keys of every block-sparse attention in 8 bits.

    rewrite:
        block_sparse_attention(q, k, v, layout)
     -> block_sparse_attention_int8(q, k, v, layout)
    """

    scores: Literal["int8", "fp8", "exact"] = "int8"
    """What q k^T is computed in; `exact` stands for the exact limit, which changes nothing."""

    def apply(self, program: Program, log: PassLog) -> None:
        if self.scores == "exact":
            log.note("exact scores: every attention stays as it is")
            return
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.target is not ops.block_sparse_attention:
                continue
            if log.take(node):
                new = insert_like(program.graph, node, _CODES[self.scores][0], node.args, node)
                new.kwargs = node.kwargs
                new.meta["rewritten_by"] = (*node.meta.get("rewritten_by", ()), self.name)
                log.claim_slots([node], {node: new})
                log.applied(node, rule=self.scores, inserted=[new], removed=[node])
                node.replace_all_uses_with(new)
                program.graph.erase_node(node)
        log.finish(("tilewright::block_sparse_attention",))

    def reference(self, program: Program) -> None:
        """The same attentions of queries and keys rounded to their codes and back."""
        for node in [n for n in program.graph.nodes if n.target is ops.block_sparse_attention]:
            if self.scores != "exact":
                kind = _CODES[self.scores][1]
                queries, keys = partial(rounded_queries, kind=kind), partial(rounded_keys, kind=kind)
                (q,), _ = insert_after(program, node.args[0], queries, [node.args[0]])
                (k,), _ = insert_after(program, node.args[1], keys, [node.args[1]])
                node.args = (q, k, *node.args[2:])

    def exact_limit(self) -> QuantizeAttention:
        return replace(self, scores="exact")

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x, table, weight = Tensor(2, 14, 8), Tensor(1, 12, 1, 4), Tensor(8, 8, weight=True)
        inputs = (x, table, table, weight, weight)
        yield {"scores": "fp8"}, Example(small.two_dense_layers, inputs, count=2)
        yield {}, Example(small.two_dense_layers, inputs, count=2)
