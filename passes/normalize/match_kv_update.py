"""Raise the write of new keys or values into a preallocated cache to one `kv_update` op."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tilewright.compiler import (
    ACCEPT,
    Exactness,
    Example,
    Match,
    Rewrite,
    Stage,
    Tensor,
    Verdict,
    free,
    number,
    ops,
    refuse,
    rewrite_pass,
)

aten = torch.ops.aten


@rewrite_pass("match-kv-update", stage=Stage.NORMALIZE, exactness=Exactness.BITWISE, trains=True)
class MatchKvUpdate(Rewrite):
    """Recognise writes into a cache that is an input of the program.

    rewrite:
        index_copy(cache, dim, positions, new)  |  slice_scatter(cache, new, dim, start, start + T)
     -> kv_update(cache, new, positions, dim)

    The cache is an input that the program writes back, or any input of four axes. `index_put` (sliding
    windows, caches kept per sequence) stays as it is.
    """

    near_miss_depth = 1

    @staticmethod
    def pattern(cache, new, positions, dim):
        yield "index-copy", aten.index_copy(cache, dim, positions, new)
        yield "slice-scatter", aten.slice_scatter(cache, new, dim, number("start"), free("end"), 1)
        yield "index-put", aten.index_put(cache, free("indices"), new, free("accumulate"))

    def where(self, m: Match) -> Verdict:
        if m["cache"].op not in ("placeholder", "get_attr"):
            return refuse(f"{m['cache'].name} is computed, not an input", at=m["cache"])
        spec = m.program.spec(m["cache"]) if m.program is not None else None
        if not (spec is not None and spec.mutated) and m.val("cache").dim() != 4:
            return refuse(
                f"{m['cache'].name} has shape {m.shape('cache')} and is not written back", at=m["cache"]
            )
        if m.form == "index-put":
            return refuse("rows are put at positions of their own per sequence, which kv_update does not say")
        return m.same_dtype("cache", "new") or ACCEPT

    def replacement(self, cache, new, positions, dim, form, chosen):
        if form == "slice-scatter":
            start = chosen["start"]
            positions = torch.arange(start, start + new.shape[dim], device=cache.device)
        return ops.kv_update(cache, new, positions, dim)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        cache, new, at = Tensor(2, 3, 9, 4), Tensor(2, 3, 2, 4), torch.tensor([5, 2])

        def window(cache, new):
            cache = cache.clone()
            cache[:, :, 3:5] = new
            return cache

        def in_place(cache, new, at):
            cache.index_copy_(1, at, new)
            return cache * 2.0

        yield {}, Example(lambda c, n, p: torch.index_copy(c, 2, p, n), (cache, new, at))
        yield {}, Example(in_place, (Tensor(2, 9, 4), Tensor(2, 2, 4), at))
        yield {}, Example(lambda c, n: torch.slice_scatter(c, n, 2, 3, 5), (cache, new))
        yield {}, Example(window, (cache, new))
        yield (
            {},
            Example(
                lambda c, n, p: torch.index_copy(c + 1.0, 2, p, n), (cache, new, at), refusal="is computed"
            ),
        )
        yield (
            {},
            Example(
                lambda c, n, p: torch.index_copy(c, 1, p, n),
                (Tensor(2, 9, 4), Tensor(2, 2, 4), at),
                refusal="not written back",
            ),
        )

        def rows(cache, new, at):
            cache = cache.clone()
            cache[:, :, at] = new
            return cache

        yield {}, Example(rows, (cache, new, at), refusal="of their own")
