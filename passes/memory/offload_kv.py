"""Keys and values in extents that need not all be in the fast tier: attention goes extent by extent.

The merge by log-sum-exp is that of arXiv:2205.14135 (FlashAttention).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass, ops
from tilewright.passes.memory._paged_sites import SITES, decode_inputs, first_of, refusal, replace


@graph_pass(
    "offload-kv",
    stage=Stage.MEMORY,
    exactness=Exactness.ROUNDING,
    owns=("attention.placement",),
)
class OffloadKV(GraphPass):
    """Cut attention over pages at the borders of extents, so that each can be read where it lies.

    rewrite:
        paged_attention(q, pool, table, lengths)
     -> merge(paged_attention(q, pool, table[:, e : e + n], lengths - e * page) for each extent e)

    As the policy of `tilewright.kv_cache` it also places the extents: at most `fast_bytes` are in memory, the
    others in the slow tier, and `prefetch` of them are read ahead of the attention, across layers. Placement
    changes no bit of the result.
    """

    fast_bytes: int = 1 << 30
    """Most bytes of keys and values in memory (64MiB and the like may be written)."""
    tier: Literal["disk", "host"] = "disk"
    """Where the others lie: a nameless file past the page cache, or memory outside of the fast tier."""
    prefetch: int = 4
    """Extents read ahead; 0 for none."""
    extent_bytes: int = 1 << 18
    """Least bytes of an extent, the unit of a transfer."""
    folder: str = ""
    """Of the file; empty for one of the cache of this user."""

    def validate(self) -> None:
        if not 4096 <= self.extent_bytes <= 1 << 30:
            raise self.option_error("extent_bytes", "expected 4KiB to 1GiB")
        if self.fast_bytes < self.extent_bytes:
            raise self.option_error("fast_bytes", f"expected an extent or more, {self.extent_bytes} bytes")
        if not 0 <= self.prefetch <= 1024:
            raise self.option_error("prefetch", "expected 0 to 1024 extents")

    def pages(self, k_pages: Tensor, v_pages: Tensor) -> int:
        """Pages of an extent, for pools [N, Hkv, P, D] and [N, Hkv, P, E]."""
        size = sum(x.shape[1] * x.shape[2] * x.shape[3] * x.element_size() for x in (k_pages, v_pages))
        return -(-self.extent_bytes // size)

    def attend(self, q, k_pages, v_pages, table, lengths, first, scale):
        """The rewritten attention: (out, lse)."""
        step, page = self.pages(k_pages, v_pages), k_pages.shape[2]
        begin = first_of(lengths, first)
        parts = []
        for start in range(0, table.shape[1], step):
            places = table[:, start : start + step]
            there = (lengths - start * page, begin - start * page)
            parts.append(ops.paged_attention(q, k_pages, v_pages, places, *there, None, scale))
        out, lse = parts[0][0].to(parts[0][1].dtype), parts[0][1]
        for part in parts[1:]:
            out, lse = ops.merge_attention(out, lse, *part)
        return out.to(q.dtype), lse

    def apply(self, program: Program, log: PassLog) -> None:
        for node in [n for n in program.graph.nodes if n.target in SITES]:
            given = [*node.args, *(None,) * (8 - len(node.args))]
            if reason := self._refusal(node, given):
                log.refused(node, reason)
            elif log.take(node):
                replace(program, log, node, [*given[:6], given[7]], self.attend)
        log.finish(("paged_attention",))

    def _refusal(self, node: Any, given: list[Any]) -> str:
        if node.target is not ops.paged_attention:
            return "single tokens are attended: only whole pages are cut into extents"
        if reason := refusal(given, None):
            return reason
        places = given[3].meta["val"].shape[1]
        most = self.pages(*(given[i].meta["val"] for i in (1, 2)))
        return f"its {places} pages are one extent" if places <= most else ""

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        few = {"extent_bytes": 4096}
        inputs = decode_inputs()
        yield few, Example(ops.paged_attention, inputs)
        yield few, Example(lambda *given: ops.paged_attention(*given)[0], inputs[:5])
        yield {}, Example(ops.paged_attention, inputs, refusal="its 8 pages are one extent")
        yield few, Example(ops.paged_attention, decode_inputs(2), refusal="2 queries at once")
