"""Raise attention over the text tokens that a mask keeps, gathered sample by sample, to one masked attention.

Mochi gathers the valid text tokens of each prompt behind the tokens of its video, attends, and pads the
result back to the common length. The gathered length depends on data: no layout, kernel or batch can be
planned over it. With the kept tokens moved in front of the others the lengths are static, and a count says
which keys are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tilewright.compiler import (
    Exactness,
    Example,
    GraphPass,
    PassLog,
    Program,
    Stage,
    graph_pass,
    ops,
)
from tilewright.compiler.dataflow import op_name, tensor_of
from tilewright.compiler.schema import arguments
from tilewright.passes.normalize._ragged_examples import ragged_examples
from tilewright.passes.normalize._ragged_tokens import attend_kept, entries_of, gathered, replaced


@dataclass(frozen=True)
class _Sample:
    """The attention of one batch entry."""

    attention: fx.Node
    padded: fx.Node
    whole: tuple[fx.Node, ...]
    """q, k and v of the tokens that are always there: [1, H, N, D]."""
    text: tuple[fx.Node, ...]
    """What q, k and v of the others are gathered from: [1, H, L, D]."""
    mask: fx.Node
    """[L]: a token is gathered where it is not zero."""


@graph_pass("match-ragged-attention", stage=Stage.NORMALIZE, exactness=Exactness.ROUNDING, trains=True)
class MatchRaggedAttention(GraphPass):
    """Attend all text tokens, those that the mask leaves out behind the others and masked.

    rewrite:
        i = nonzero(mask[b]); pad(attention(cat(q[b], text_q[b][i]), cat(k[b], ...), ...)) for each b
     -> order = argsort(mask, descending, stable); kept = positions < N + mask.sum(1)
        where(kept, attention(cat(q, text_q[order]), cat(k, ...), ..., mask=kept), 0)

    Dynamo leaves such a gather in one graph where `torch._dynamo.config.capture_dynamic_output_shape_ops` is
    set; without it the graph breaks there.
    """

    def apply(self, program: Program, log: PassLog) -> None:
        groups: dict[fx.Node, list[_Sample]] = {}
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.target is not ops.attention:
                continue
            sample = self._sample(node)
            if isinstance(sample, str):
                log.refused(node, sample)
            elif sample is not None:
                users = list(sample.padded.users)
                joined = len(users) == 1 and op_name(users[0]) == "cat" and users[0].args[1:] in ((), (0,))
                groups.setdefault(users[0] if joined else sample.padded, []).append(sample)
        for result, samples in groups.items():
            self._raise(program, result, samples, log)
        log.finish(("aten::nonzero",))

    @staticmethod
    def _sample(node: fx.Node) -> _Sample | str | None:
        """What one attention is made of, or why it is no such; None where nothing is gathered by a mask."""
        given = arguments(node)
        parts = [gathered(given[name]) for name in ("q", "k", "v")]
        found = [p for p in parts if p is not None]
        if not found:
            return None
        if len(found) < 3 or len({p.mask for p in found}) > 1:
            return "queries, keys and values are not gathered by one mask"
        if given["mask"] is not None or given["causal"]:
            return "it has a mask of its own beside the gathered tokens"
        whole = tuple(p.whole for p in found if p.whole is not None)
        if len(whole) < 3:
            return "the gathered tokens do not stand behind tokens that are always there"
        padded = next(iter(node.users), None)
        if padded is None or len(node.users) > 1 or op_name(padded) != "pad":
            return "its result is not padded back to all tokens"
        length = found[0].text.meta["val"].shape[2] + whole[0].meta["val"].shape[2]
        value = tensor_of(padded)
        amounts: Any = padded.args[1]
        fill = padded.args[3] if len(padded.args) > 3 else None
        plain = padded.args[2:3] in ((), ("constant",)) and fill in (None, 0)
        if value is None or value.shape[2] != length or tuple(amounts[:3]) != (0, 0, 0) or not plain:
            return f"its result is not padded with zeros behind its tokens to {length}"
        return _Sample(node, padded, whole, tuple(p.text for p in found), found[0].mask)

    @staticmethod
    def _raise(program: Program, result: fx.Node, samples: list[_Sample], log: PassLog) -> None:
        first = samples[0].attention
        given = arguments(first)
        ways = {tuple(arguments(s.attention)[n] for n in ("scale", "softcap", "sinks")) for s in samples}
        if len(ways) > 1:
            log.refused(first, "its samples are attended in different ways")
            return
        tensors = [entries_of([s.whole[i] for s in samples]) for i in range(3)]
        tensors += [entries_of([s.text[i] for s in samples]) for i in range(3)]
        tensors.append(entries_of([s.mask for s in samples]))
        inputs = [t for t in tensors if t is not None]
        parts: Any = result.args[0] if op_name(result) == "cat" else [result]
        if len(inputs) < 7 or list(parts) != [s.padded for s in samples]:
            log.refused(first, "its samples are not the entries of one batch, one after another")
            return
        if not log.take(first):
            return
        sinks = [given["sinks"]] if isinstance(given["sinks"], fx.Node) else []

        def attend(*values: torch.Tensor) -> torch.Tensor:
            return attend_kept(values, given["scale"], given["softcap"])

        made = replaced(program, result, attend, [*inputs, *sinks])
        removed = list(dict.fromkeys([result, *(n for s in samples for n in (s.padded, s.attention))]))
        log.applied(first, rule=f"{len(samples)} samples", inserted=made, removed=removed)
        for node in removed:
            program.graph.erase_node(node)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        for example in ragged_examples():
            yield {}, example
