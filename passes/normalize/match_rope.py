"""Raise rotary position embedding, half or interleaved, to one `rope` op.

paper: arXiv:2104.09864 (RoFormer). The half form pairs channel i with i + D/2, the interleaved form 2i with
2i + 1.
Where a model rotates only part of the channels, the rotated slice is what is matched.
"""

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
    either,
    free,
    known_equal,
    ops,
    refuse,
    rewrite_pass,
)
from tilewright.passes.normalize._spelling import maybe_cast

aten = torch.ops.aten


def _halves(x):
    """(first half, second half) of the last axis, by slices, chunks, splits or a pair axis in front."""
    chunk, split = aten.chunk(x, free("chunks"), -1), aten.split(x, free("size"), -1)
    listed = aten.split_with_sizes(x, free("sizes"), -1)
    folded = aten.unbind(aten.reshape(x, free("pair")), free("axis"))
    cut = (
        aten.slice(x, -1, free("start"), free("low"), 1),
        aten.slice(x, -1, free("high"), free("end"), 1),
    )
    return tuple(
        either("parts", slices=cut[i], chunk=chunk[i], split=split[i], listed=listed[i], unbind=folded[i])
        for i in (0, 1)
    )


def _minus(x):
    return either("minus", neg=-x, product=x * -1)


def _pairs(x):
    """(even channels, odd channels) of the last axis, by strided slices or a pair axis behind."""
    whole = aten.reshape(x, free("pair"))
    folded = aten.unbind(whole, free("axis"))
    return tuple(
        either(
            "parts",
            strided=aten.slice(x, -1, i, free(("low", "end")[i]), 2),
            unbind=folded[i],
            select=aten.select(whole, free("axis"), i),
        )
        for i in (0, 1)
    )


@rewrite_pass("match-rope", stage=Stage.NORMALIZE, exactness=Exactness.ROUNDING, trains=True)
class MatchRope(Rewrite):
    """Recognise the rotation of channel pairs by position.

    rewrite:
        x * cos + cat(-x2, x1) * sin  |  cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)
        x * cos + stack(-odd, even).flatten * sin  |  stack(even * cos - odd * sin, odd * cos + even *
        sin).flatten -> rope(x, cos, sin, interleaved)

    Pairs that are written as halves (DeepSeek) are reordered first: rope(cat(even, odd), cos, sin).
    In the forms that write both parts apart, cos and sin have D/2 channels and are widened to D.
    """

    inner_may_escape = True

    @staticmethod
    def pattern(x, cos, sin):
        whole = either("outer", same=x, regrouped=aten.reshape(x, free("outer_sizes")))
        factor = maybe_cast("cast", whole, free("dtype")) * cos
        a, b = _halves(x)
        yield "half", factor + maybe_cast("cast", aten.cat([_minus(b), a], -1), free("dtype")) * sin
        yield "half-apart", aten.cat([a * cos - b * sin, b * cos + a * sin], -1)
        even, odd = _pairs(x)
        turned = aten.reshape(aten.stack([_minus(odd), even], -1), free("joined"))
        yield "interleaved", factor + maybe_cast("cast", turned, free("dtype")) * sin
        rotated = aten.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
        yield "interleaved-apart", aten.reshape(rotated, free("joined"))
        yield "pairs-to-halves-apart", aten.cat([even * cos - odd * sin, odd * cos + even * sin], -1)

    def where(self, m: Match) -> Verdict:
        shape = tuple(m.root.meta["val"].shape)
        if not shape or not isinstance(shape[-1], int) or shape[-1] % 2:
            return refuse(f"the result has shape {shape}, expected an even number of channels", at=m.root)
        reason = self._parts(m, shape)
        if reason is not None:
            return refuse(reason, at=m["x"])
        for name in ("cos", "sin"):
            if not m.is_tensor(name):
                return refuse(f"{name} is {m[name]}, expected a tensor", at=m[name])
        return ACCEPT

    def _parts(self, m: Match, shape: tuple) -> str | None:
        """Why the parts are not the halves or pairs of the channels; None when they are."""
        half, parts = shape[-1] // 2, m["parts"]
        if parts in ("unbind", "select"):
            halves = m.form.startswith("half")
            tail = [2, half] if halves else [half, 2]
            wanted, got = [*shape[:-1], *tail], list(m["pair"])
            if len(got) != len(wanted) or not all(g in (w, -1) for g, w in zip(got, wanted, strict=True)):
                return f"its channels are folded to {got}, expected {wanted}"
            axis = len(shape) - 1 if halves else len(shape)
            return (
                None
                if m["axis"] % len(got) == axis
                else f"parts are taken along axis {m['axis']}, expected {axis}"
            )
        x = m.shape("x")
        if len(x) != len(shape) or not all(known_equal(p, q) for p, q in zip(x, shape, strict=True)):
            return f"the result has shape {shape}, x has {tuple(x)}"
        if parts == "slices" and ((m["start"] or 0), m["low"], m["high"]) != (0, half, half):
            return f"it is cut at {m['low']} and {m['high']}, its half is {half}"
        # Where parts end, and into how many chunks x is cut, follows from two parts that fill the result.
        if parts in ("split", "listed") and (m["size"] or list(m["sizes"])) not in (half, [half, half]):
            return f"it is split by {m['size'] or m['sizes']}, its half is {half}"
        return None

    def replacement(self, x, cos, sin, form, chosen):
        interleaved = form.startswith("interleaved")
        if form.endswith("-apart"):
            cos, sin = (_widened(t, interleaved) for t in (cos, sin))
        if chosen["parts"] in ("unbind", "select"):
            pair = chosen["pair"]
            width = pair[-2] * pair[-1] if -1 not in pair[-2:] else -1
            sizes = [*pair[:-2], width]
            if len(sizes) != x.dim() or any(w not in (-1, s) for w, s in zip(sizes, x.shape, strict=True)):
                x = x.reshape(sizes)
        if form == "pairs-to-halves-apart":
            last, width = x.dim() - 1, x.shape[-1]
            x = torch.cat([aten.slice(x, last, i, width, 2) for i in (0, 1)], last)
        return ops.rope(x.to(chosen["dtype"]) if chosen.get("cast") == "cast" else x, cos, sin, interleaved)

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
        yield (
            {},
            Example(
                lambda x, c, s: (x.float() * c + torch.cat((-x[..., 4:], x[..., :4]), -1).float() * s).to(
                    x.dtype
                ),
                (low, table, table),
            ),
        )
        wide = Tensor(2, 5, 24)

        def grouped(x, cos, sin):
            return unbound(x.reshape(2, 5, 3, 8), cos, sin)

        def front(x, cos, sin, fold=(2, -1), axis=-2):
            a, b = x.unflatten(-1, fold).unbind(axis)
            return x * cos + torch.cat((-b, a), -1) * sin

        def listed(x, cos, sin, first=4):
            a, b = x.split([first, 8 - first], -1)
            return x * cos + torch.cat((-b, a), -1) * sin

        four = (Tensor(2, 3, 5, 4), Tensor(5, 4), Tensor(5, 4))
        yield {}, Example(lambda x, c, s: front(x, c, s, (-1, 2), -1), (x, table, table), refusal="folded to")
        yield (
            {},
            Example(lambda x, c, s: front(x, c, s, (2, 2), -1), four, refusal="along axis 4, expected 3"),
        )
        yield {}, Example(apart, (x, Tensor(5, 1), Tensor(5, 4)))

        def reordered(x, cos, sin):
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        yield {}, Example(reordered, (x, narrow, narrow))
        yield {}, Example(unbound, (Tensor(2, 3, 5, 4), Tensor(5, 2), Tensor(5, 2)))
        yield {}, Example(grouped, (wide, Tensor(5, 1, 4), Tensor(5, 1, 4)))
        yield {}, Example(front, (x, table, table))
        yield {}, Example(listed, (x, table, table))
        yield {}, Example(lambda x, c, s: half(x, c, s, 3), (x, table, table), refusal="cut at 3")
        yield {}, Example(lambda x, c, s: listed(x, c, s, 3), (x, table, table), refusal="split by [3, 5]")
        yield {}, Example(lambda x, c: half(x, c, 0.5), (x, table), refusal="sin is 0.5")
        odd = (Tensor(2, 5, 7), Tensor(5, 7), Tensor(5, 7))
        yield {}, Example(lambda x, c, s: half(x, c, s, 3), odd, refusal="even number")
        yield {}, Example(half, (x, table, Tensor(3, 2, 3, 5, 8)), refusal="the result has shape")


def _widened(table, interleaved):
    """A table for each pair as one for each channel; one value for all channels stays."""
    if table.dim() == 0 or table.shape[-1] == 1:
        return table
    last = table.dim() - 1
    if not interleaved:
        return torch.cat((table, table), last)
    pairs = torch.stack((table, table), last + 1)
    sizes = [n if isinstance(n, int) else -1 for n in (*table.shape[:-1], 2 * table.shape[-1])]
    return pairs.reshape(sizes) if sizes.count(-1) <= 1 else pairs.flatten(last)
