"""Keys and values rounded to 8 or 4 bits as they enter the cache of a program.

paper: arXiv:2404.00456 (QuaRot, section 4.2). A token's keys and values are rounded on their own when they
are written, one scale and zero point for a group of channels of a head; so a prefill and a decode store the
same, and nothing is rounded twice. `rotate` rounds behind a Hadamard transform, as QuaRot does with keys.

A program that makes its cache itself (the first call of a StaticCache without `early_initialization`) is
refused and writes as before.

In a graph the storage is emulated: what is rounded goes back into the cache in the dtype it has, so THE CACHE
TAKES NO LESS MEMORY, and the pass tells what quality 8 or 4 bits cost. The cache of `tilewright.kv_cache`
keeps the codes themselves and attends to them, which computes the same. The error is measured as relative RMS
of what is written, and as the ratio of perplexities (`python -m tilewright.tools.quality_table`, rows
`KV8`...).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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
    Tensor,
    graph_pass,
    ops,
)
from tilewright.compiler.dataflow import tensor_of
from tilewright.compiler.graph import insert_like
from tilewright.compiler.quantizers import IDENTITY_BITS
from tilewright.compiler.schema import arguments
from tilewright.passes.quantize._kv_sites import kv_sites, rounded_by_formula


@graph_pass(
    "quantize-kv",
    stage=Stage.MEMORY,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2404.00456",
    owns=("attention.cache_policy",),
)
class QuantizeKV(GraphPass):
    """Round keys and values on their way into a cache (emulated in a graph; `kv_cache` keeps the codes).

    rewrite:
        attention(q, kv_update(keys, k, positions), kv_update(values, v, positions))
     -> attention(q, kv_update(keys, kv_round(k), positions), kv_update(values, kv_round(v), positions))
    """

    bits: int = 8
    """8 or 4; 16 stands for the exact limit, which changes nothing."""
    group: int = 0
    """Channels of a head that share a scale; 0 for all of them."""
    rotate: bool = False
    """Round behind a Hadamard transform of the channels of a head, a power of two of them."""

    def validate(self) -> None:
        if self.bits not in (4, 8, IDENTITY_BITS):
            raise self.option_error("bits", f"expected 8, 4 or {IDENTITY_BITS} for none")
        if self.group < 0:
            raise self.option_error("group", "expected 1 or more channels, or 0 for those of a head")

    def apply(self, program: Program, log: PassLog) -> None:
        if self.bits == IDENTITY_BITS:
            log.note("16 bits: keys and values stay as they are")
            return
        sites = kv_sites(program)
        for update, problem in sites:
            problem = problem or self._problem(update)
            if problem:
                log.refused(update, problem)
            elif log.take(update):
                new = arguments(update)["new"]
                args = (new, self.bits, self.group, self.rotate)
                rounded = insert_like(program.graph, update, ops.kv_round, args, new)
                rounded.meta["rewritten_by"] = (self.name,)
                update.replace_input_with(new, rounded)
                log.claim_slots([update], {update: update, rounded: rounded})
                log.applied(update, rule=f"{self.bits} bits", inserted=[rounded])
        if sites:
            log.note("emulated storage: the cache keeps its dtype and its size, no memory is saved")
        log.finish(("tilewright::attention",))

    def _problem(self, update: fx.Node) -> str:
        given = arguments(update)
        new = tensor_of(given["new"])
        if given["new"].target is ops.kv_round:
            return "what it writes is rounded already"
        if new is None or not new.is_floating_point():
            return "what it writes is not floating point"
        if given["dim"] % new.dim() == new.dim() - 1:
            return "its tokens lie along the last axis, where the channels of a head are expected"
        size = new.shape[-1]
        if self.group and (not isinstance(size, int) or size % self.group):
            return f"its heads have {size} channels, which groups of {self.group} do not divide"
        if self.rotate and (not isinstance(size, int) or size < 2 or size & (size - 1)):
            return f"its heads have {size} channels; rotate needs a power of two"
        return ""

    def reference(self, program: Program) -> None:
        """The same writes, rounded by the formula of the paper written out."""
        if self.bits == IDENTITY_BITS:
            return
        for update, problem in kv_sites(program):
            if not problem and not self._problem(update):
                new = arguments(update)["new"]
                args = (new, self.bits, self.group, self.rotate)
                with program.graph.inserting_before(update):
                    update.replace_input_with(new, program.graph.call_function(rounded_by_formula, args))

    def exact_limit(self) -> QuantizeKV:
        return replace(self, bits=IDENTITY_BITS)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], Example]]:
        cache, new, q, at = Tensor(2, 3, 9, 8), Tensor(2, 3, 2, 8), Tensor(2, 3, 2, 8), torch.tensor([5, 2])
        inputs = (cache, new, cache, new, q, at)

        def decode(keys, k, values, v, q, at):
            return ops.attention(q, ops.kv_update(keys, k, at, 2), ops.kv_update(values, v, at, 2))

        yield {}, Example(decode, inputs, count=2)
        yield {"bits": 4, "group": 4}, Example(decode, inputs, count=2)
        yield {"bits": 4, "rotate": True}, Example(decode, inputs, count=2)
        yield {"group": 3}, Example(decode, inputs, refusal="groups of 3 do not divide")
        six, wide = Tensor(2, 3, 2, 6), Tensor(2, 3, 9, 6)
        yield {"rotate": True}, Example(decode, (wide, six, wide, six, six, at), refusal="power of two")
        yield {}, Example(ops.attention, (q, q, q), refusal="comes from no cache")
