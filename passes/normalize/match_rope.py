"""Raise rotary position embedding, half or interleaved, to one `rope` op.

paper: arXiv:2104.09864 (RoFormer). The half form pairs channel i with i + D/2, the interleaved form 2i with 2i + 1.
Where a model rotates only part of the channels, the rotated slice is what is matched.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tilewright.compiler import (
    ACCEPT, Exactness, Example, Match, Rewrite, Stage, Tensor, Verdict, either, known_equal, ops, refuse, rewrite_pass,
)
from tilewright.passes.normalize._spelling import maybe_cast

aten = torch.ops.aten


def _halves(choice, x, h):
    """(first half, second half) of the last axis, by slices, chunks, splits or a pair axis in front."""
    names = ("start", "low", "high", "end", "chunks", "size", "sizes", "pair", "axis")
    start, low, high, end, chunks, size, sizes, pair, axis = (h[n] for n in names)
    chunk, split, listed = aten.chunk(x, chunks, -1), aten.split(x, size, -1), aten.split_with_sizes(x, sizes, -1)
    folded = aten.unbind(aten.reshape(x, pair), axis)
    return tuple(
        either(choice, slices=sliced, chunk=chunk[i], split=split[i], listed=listed[i], unbind=folded[i])
        for i, sliced in enumerate((aten.slice(x, -1, start, low, 1), aten.slice(x, -1, high, end, 1)))
    )


def _pairs(choice, x, h):
    """(even channels, odd channels) of the last axis, by strided slices or a pair axis behind."""
    folded = aten.unbind(aten.reshape(x, h["pair"]), h["axis"])
    whole = aten.reshape(x, h["pair"])
    return tuple(
        either(
            choice,
            strided=aten.slice(x, -1, i, h["end" if i else "low"], 2),
            unbind=folded[i],
            select=aten.select(whole, h["axis"], i),
        )
        for i in (0, 1)
    )


@rewrite_pass("match-rope", stage=Stage.NORMALIZE, exactness=Exactness.ROUNDING, trains=True)
class MatchRope(Rewrite):
    """Recognise the rotation of channel pairs by position.

    rewrite:
        x * cos + cat(-x2, x1) * sin  |  cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)
        x * cos + stack(-odd, even).flatten * sin  |  stack(even * cos - odd * sin, odd * cos + even * sin).flatten
     -> rope(x, cos, sin, interleaved)

    In the forms that write both halves apart, cos and sin have D/2 channels and are widened to D.
    """

    inner_may_escape = True

    @staticmethod
    def pattern(x, cos, sin, parts, start, low, high, end, chunks, size, sizes, pair, axis, cast, dtype, joined):
        h = dict(start=start, low=low, high=high, end=end, chunks=chunks, size=size, sizes=sizes, pair=pair, axis=axis)
        a, b = _halves(parts, x, h)
        turned = maybe_cast(cast, aten.cat([-b, a], -1), dtype)
        yield "half", maybe_cast(cast, x, dtype) * cos + turned * sin
        yield "half-apart", aten.cat([a * cos - b * sin, b * cos + a * sin], -1)
        even, odd = _pairs(parts, x, h)
        turned = maybe_cast(cast, aten.reshape(aten.stack([-odd, even], -1), joined), dtype)
        yield "interleaved", maybe_cast(cast, x, dtype) * cos + turned * sin
        yield "interleaved-apart", aten.reshape(aten.stack([even * cos - odd * sin, odd * cos + even * sin], -1), joined)

    def where(self, m: Match) -> Verdict:
        shape = m.shape("x")
        width = shape[-1]
        if not isinstance(width, int) or width % 2:
            return refuse(f"x has {width} channels, expected an even number", at=m["x"])
        if (no := self._parts(m, width)) is not None:
            return refuse(no, at=m["x"])
        narrow = width // 2 if m.form.endswith("-apart") else width
        for name in ("cos", "sin"):
            if not m.is_tensor(name):
                return refuse(f"{name} is {m[name]}, expected a tensor", at=m[name])
            table = m.shape(name)
            if not table or table[-1] not in (1, narrow):
                return refuse(f"{name} has shape {table}, expected {narrow} channels", at=m[name])
        made = m.root.meta["val"].shape
        if len(made) != len(shape) or not all(known_equal(p, q) for p, q in zip(made, shape, strict=True)):
            return refuse(f"the result has shape {tuple(made)}, x has {tuple(shape)}", at=m.root)
        return ACCEPT

    def _parts(self, m: Match, width: int) -> str | None:
        """Why the parts of the last axis are not the wanted halves or pairs; None when they are."""
        half, parts = width // 2, m["parts"]
        if parts == "slices" and ((m["start"] or 0), m["low"], m["high"]) != (0, half, half):
            return f"it is cut at {m['low']} and {m['high']}, its half is {half}"
        if parts in ("slices", "strided") and m["end"] is not None and not m["end"] >= width - (parts == "strided"):
            return f"the second part ends at {m['end']}, the axis at {width}"
        if parts == "strided" and m["low"] is not None and not m["low"] >= width - 1:
            return f"the even channels end at {m['low']}, the axis at {width}"
        if parts == "chunk" and m["chunks"] != 2:
            return f"it is cut into {m['chunks']} chunks, expected 2"
        if (parts == "split" and m["size"] != half) or (parts == "listed" and list(m["sizes"]) != [half, half]):
            return f"it is split by {m['size'] or m['sizes']}, its half is {half}"
        if parts in ("unbind", "select"):
            tail = [2, half] if m.form.startswith("half") else [half, 2]
            axis = m.val("x").dim() - (1 if tail[0] == 2 else 0)
            got = list(m["pair"])
            if len(got) != m.val("x").dim() + 1 or not _fits(got[-2:], tail):
                return f"its channels are folded to {got[-2:]}, expected {tail}"
            if m["axis"] % len(got) != axis:
                return f"parts are taken along axis {m['axis']}, expected {axis}"
        return None

    def replacement(
        self, x, cos, sin, parts, start, low, high, end, chunks, size, sizes, pair, axis, cast, dtype, joined, form
    ):
        interleaved = form.startswith("interleaved")
        if form.endswith("-apart"):
            if interleaved:
                cos, sin = (torch.stack((t, t), -1).flatten(-2) for t in (cos, sin))
            else:
                cos, sin = (torch.cat((t, t), -1) for t in (cos, sin))
        return ops.rope(x.to(dtype) if cast == "cast" else x, cos, sin, interleaved)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x, table, narrow = Tensor(2, 3, 5, 8), Tensor(5, 8), Tensor(5, 4)

        def half(x, cos, sin, at=4):
            return x * cos + torch.cat((-x[..., at:], x[..., :at]), -1) * sin

        def apart(x, cos, sin, parts=2):
            a, b = x.chunk(parts, -1)[:2]
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        def pairs(x, cos, sin, stop=None):
            return x * cos + torch.stack((-x[..., 1:stop:2], x[..., 0:stop:2]), -1).flatten(-2) * sin

        def unbound(x, cos, sin, fold=(-1, 2), axis=-1):
            a, b = x.unflatten(-1, fold).unbind(axis)
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

        def written(x, cos, sin):
            out = torch.empty_like(x)
            out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
            out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
            return out

        yield {}, Example(half, (x, table, table))
        yield {}, Example(apart, (x, narrow, narrow))
        yield {}, Example(pairs, (x, table, table))
        yield {}, Example(unbound, (x, narrow, narrow))
        yield {}, Example(written, (x, narrow, narrow))
        low = Tensor(2, 3, 5, 8, dtype=torch.bfloat16)
        yield {}, Example(lambda x, c, s: (x.float() * c + torch.cat((-x[..., 4:], x[..., :4]), -1).float() * s).to(x.dtype), (low, table, table))
        yield {}, Example(lambda x, c, s: half(x, c, s, 3), (x, table, table), refusal="cut at 3")
        yield {}, Example(lambda x, c: half(x, c, 0.5), (x, table), refusal="sin is 0.5")
        yield {}, Example(lambda x, c, s: half(x, c, s, 3), (Tensor(2, 5, 7), Tensor(5, 7), Tensor(5, 7)), refusal="even number")
        yield {}, Example(half, (x, table, Tensor(3, 2, 3, 5, 8)), refusal="the result has shape")
        yield {}, Example(half, (Tensor(2, 3, 1, 8), Tensor(4, 8), Tensor(4, 8)), refusal="the result has shape")


def _fits(got: list, want: list[int]) -> bool:
    """True when sizes with at most one -1 are the wanted ones."""
    return all(g in (w, -1) for g, w in zip(got, want, strict=True))
