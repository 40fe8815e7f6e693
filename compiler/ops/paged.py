"""Attention over a paged KV pool, and what keeps and searches such a pool.

The pool of one layer is k_pages [N, Hkv, P, D] and v_pages [N, Hkv, P, E]. `page_table` int32 [B, n] names
the page that holds positions i P .. i P + P - 1 of each sequence, -1 where none is held: a position without
a page has no key. `lengths` int64 [B] counts the tokens of each sequence, the T new ones included, so query
t of sequence b stands at position lengths[b] - T + t. Positions below first[b] are padding. Queries see
positions up to their own. Query head h reads key head h // (H / Hkv). Log-sum-exps are natural logarithms; a
query that sees no key gives 0 and -inf. Products and sums run in float32, in float64 for float64.

Selectors keep every page and attend some (`picked`, `positions`); evictors put -1 into the table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.ops.registry import define

PAGE_SIZES = (8, 16, 32, 64, 128)
"""Tokens of a page that the kernels take."""
ROWS = 256
"""Query rows at a time: no tensor of the definitions is larger than ROWS x keys per head."""


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def fail(op: str, text: str) -> None:
    raise ValueError(f"{op}: {text}")


def _check_pool(op: str, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor) -> None:
    """Raise ValueError for a pool, new rows [B, H, T, D] and a table that do not fit each other."""
    fits = q.dim() == k_pages.dim() == v_pages.dim() == 4
    fits = fits and k_pages.shape[:3] == v_pages.shape[:3] and q.shape[3] == k_pages.shape[3]
    fits = fits and k_pages.shape[1] > 0 and q.shape[1] % k_pages.shape[1] == 0
    if not fits:
        fail(
            op,
            f"q {list(q.shape)}, k_pages {list(k_pages.shape)}, v_pages {list(v_pages.shape)} must be "
            "[B, H, T, D], [N, Hkv, P, D], [N, Hkv, P, E] with H a multiple of Hkv",
        )
    if not q.dtype == k_pages.dtype == v_pages.dtype or not q.dtype.is_floating_point:
        fail(op, f"q {q.dtype}, k_pages {k_pages.dtype}, v_pages {v_pages.dtype} must be one floating dtype")
    check_index(op, "page_table", page_table, torch.int32, 2, q.shape[0])


def check_index(op: str, name: str, index: Tensor | None, dtype: torch.dtype, axes: int, batch: int) -> None:
    if index is not None and (index.dtype != dtype or index.dim() != axes or index.shape[0] != batch):
        fail(op, f"{name} is {list(index.shape)} {index.dtype}; it must be {dtype} of {axes} axes, B first")


def _check_attention(
    op: str,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    first: Tensor | None,
    entries: tuple[str, Tensor | None],
) -> None:
    _check_pool(op, q, k_pages, v_pages, page_table)
    check_index(op, "lengths", lengths, torch.int64, 1, q.shape[0])
    check_index(op, "first", first, torch.int64, 1, q.shape[0])
    name, index = entries
    check_index(op, name, index, torch.int32, 3, q.shape[0])
    if index is not None and index.shape[1] not in (1, k_pages.shape[1]):
        fail(op, f"{name} has {index.shape[1]} heads; it must have 1 or Hkv = {k_pages.shape[1]}")


def _gather(pages: Tensor, page_table: Tensor, kept: Tensor) -> Tensor:
    """[B, Hkv, n P, D]: the rows of each sequence in order, in at least float32; 0 where not `kept`."""
    rows = pages[page_table.clamp(min=0).long()].transpose(1, 2).flatten(2, 3)
    return torch.where(kept[..., None], rows, 0).to(wide(pages))


def held(page_table: Tensor, page: int, lengths: Tensor, first: Tensor | None) -> Tensor:
    """bool [B, n P]: the positions that hold a token."""
    at = torch.arange(page_table.shape[1] * page, device=page_table.device)
    held = (page_table >= 0).repeat_interleave(page, 1) & (at < lengths[:, None])
    return held if first is None else held & (at >= first[:, None])


def _listed(entries: Tensor, size: int) -> Tensor:
    """bool [B, 1 or Hkv, size]: which of 0 .. size - 1 are entries; -1 stands for none."""
    if entries.numel() and not bool(((entries >= -1) & (entries < size)).all()):
        raise ValueError(f"an entry of picked or positions is outside -1 .. {size - 1}")
    found = torch.zeros(*entries.shape[:2], size + 1, dtype=torch.bool, device=entries.device)
    return found.scatter_(2, torch.where(entries < 0, size, entries).long(), True)[..., :size]


def attend(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, lengths: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Causal attention over the gathered rows k, v [B, Hkv, S, D] that `kept` [B, 1 or Hkv, S] names."""
    (batch, heads, tokens, size), group = q.shape, q.shape[1] // k.shape[1]
    factor = size**-0.5 if scale is None else scale
    rows = q.to(wide(q)).unflatten(1, (-1, group))
    at = torch.arange(k.shape[2], device=q.device)
    outs, sums = [], []
    for start in range(0, tokens, ROWS):
        part = rows[:, :, :, start : start + ROWS]
        place = lengths[:, None] - tokens + start + torch.arange(part.shape[3], device=q.device)
        seen = kept[:, :, None, None] & (at <= place[:, None, None, :, None])
        scores = (part @ k[:, :, None].transpose(-1, -2) * factor).masked_fill(~seen, -math.inf)
        lse = torch.logsumexp(scores, -1)
        empty = lse == -math.inf
        outs.append(torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None]) @ v[:, :, None])
        sums.append(lse)
    if not outs:
        return q.new_empty(batch, heads, 0, v.shape[3]), q.new_empty(batch, heads, 0, dtype=wide(q))
    return torch.cat(outs, 3).flatten(1, 2).to(q.dtype), torch.cat(sums, 3).flatten(1, 2)


def flops(q: Any, keys: Any, value: Any) -> Any:
    """Products, softmax and sums of every query with `keys` keys, whose values have `value` channels."""
    return q.shape[0] * q.shape[1] * q.shape[2] * keys * (2 * q.shape[3] + 2 * value + 5)


def _fake_paged(q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    table, lengths, first, picked = (*rest, None, None)[:4]
    _check_attention("paged_attention", q, k_pages, v_pages, table, lengths, first, ("picked", picked))
    return q.new_empty((*q.shape[:3], v_pages.shape[3])), q.new_empty(q.shape[:3], dtype=wide(q))


@define(
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor lengths, "
    "Tensor? first=None, Tensor? picked=None, float? scale=None) -> (Tensor, Tensor)",
    flops=lambda q, k_pages, v_pages, page_table, lengths, first=None, picked=None, scale=None, *, out: flops(
        q, (page_table if picked is None else picked).shape[-1] * k_pages.shape[2], v_pages.shape[3]
    ),
    fake=_fake_paged,
)
def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    first: Tensor | None = None,
    picked: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(attention of q [B, H, T, D] over the pages held, its log-sum-exp [B, H, T]).

    `picked` int32 [B, 1 or Hkv, m] names the pages that are attended by their place in `page_table`, each at
    most once, -1 for unused entries; None: all. scale None: 1 / sqrt(D).
    """
    _check_attention("paged_attention", q, k_pages, v_pages, page_table, lengths, first, ("picked", picked))
    page = k_pages.shape[2]
    kept = held(page_table, page, lengths, first)[:, None]
    if picked is not None:
        kept = kept & _listed(picked, page_table.shape[1]).repeat_interleave(page, 2)
    k, v = (_gather(pages, page_table, kept) for pages in (k_pages, v_pages))
    return attend(q, k, v, kept, lengths, scale)


def _fake_tokens(q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    table, lengths, positions, first = (*rest, None)[:4]
    _check_attention("token_attention", q, k_pages, v_pages, table, lengths, first, ("positions", positions))
    return q.new_empty((*q.shape[:3], v_pages.shape[3])), q.new_empty(q.shape[:3], dtype=wide(q))


@define(
    "token_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor lengths, "
    "Tensor positions, Tensor? first=None, float? scale=None) -> (Tensor, Tensor)",
    flops=lambda q, k_pages, v_pages, page_table, lengths, positions, first=None, scale=None, *, out: flops(
        q, positions.shape[-1], v_pages.shape[3]
    ),
    fake=_fake_tokens,
)
def token_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    positions: Tensor,
    first: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`paged_attention` over single tokens: `positions` int32 [B, 1 or Hkv, m] names them, each at most once,
    -1 for unused entries."""
    _check_attention(
        "token_attention", q, k_pages, v_pages, page_table, lengths, first, ("positions", positions)
    )
    page = k_pages.shape[2]
    kept = held(page_table, page, lengths, first)[:, None] & _listed(positions, page_table.shape[1] * page)
    k, v = (_gather(pages, page_table, kept) for pages in (k_pages, v_pages))
    return attend(q, k, v, kept, lengths, scale)


def written(op: str, page_table: Tensor, starts: Tensor, tokens: int, page: int) -> tuple[Tensor, Tensor]:
    """(pages, slots) of `tokens` positions from starts[b] on, int64 [B T] each. ValueError where there is no
    page."""
    at = starts[:, None] + torch.arange(tokens, device=starts.device)
    block = torch.div(at, page, rounding_mode="floor")
    inside = (block >= 0) & (block < page_table.shape[1])
    pages = page_table.long().gather(1, block.clamp(0, max(0, page_table.shape[1] - 1)))
    if not bool((inside & (pages >= 0)).all()):
        fail(op, "a position to be written has no page in page_table")
    return pages.flatten(), at.remainder(page).flatten()


def _check_append(
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    starts: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor | None,
    high: Tensor | None,
) -> None:
    _check_pool("paged_append", k, k_pages, v_pages, page_table)
    check_index("paged_append", "starts", starts, torch.int64, 1, k.shape[0])
    if k.shape[1] != k_pages.shape[1] or v.shape != (*k.shape[:3], v_pages.shape[3]) or v.dtype != k.dtype:
        fail(
            "paged_append",
            f"k {list(k.shape)}, v {list(v.shape)} must be [B, Hkv, T, D] and [B, Hkv, T, E] of one dtype",
        )
    planes = [x for x in (low, high) if x is not None]
    wanted = (k_pages.shape[0], k_pages.shape[1], k_pages.shape[3])
    if len(planes) == 1 or any(x.shape != wanted or x.dtype != k_pages.dtype for x in planes):
        fail("paged_append", f"low and high come together, as [N, Hkv, D] {k_pages.dtype}")


def _fake_append(*args: Any) -> None:
    _check_append(*(*args, None, None)[:8])


@define(
    "paged_append(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor page_table, Tensor starts, Tensor k, "
    "Tensor v, Tensor(c!)? low=None, Tensor(d!)? high=None) -> ()",
    flops=lambda k_pages, v_pages, page_table, starts, k, v, low=None, high=None, *, out: (
        0 * k.numel() if low is None else 2 * k.numel()
    ),
    fake=_fake_append,
)
def paged_append(
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    starts: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> None:
    """Write k [B, Hkv, T, D], v [B, Hkv, T, E] at positions starts[b] .. starts[b] + T - 1 of the sequences.

    `starts` int64 [B]. `low` and `high` [N, Hkv, D], when given, keep the elementwise extremes of the keys of
    each page: they start anew when its first slot is written. ValueError where a position has no page.
    """
    _check_append(k_pages, v_pages, page_table, starts, k, v, low, high)
    pages, slots = written("paged_append", page_table, starts, k.shape[2], k_pages.shape[2])
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
    k_pages[pages, :, slots] = keys
    v_pages[pages, :, slots] = values
    if low is not None and high is not None:
        fresh = pages[slots == 0]
        low[fresh], high[fresh] = math.inf, -math.inf
        at = pages[:, None, None].expand_as(keys)
        low.scatter_reduce_(0, at, keys, "amin")
        high.scatter_reduce_(0, at, keys, "amax")


def _check_bounds(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    page: int,
    first: Tensor | None,
    group: str,
) -> None:
    fits = q.dim() == 4 and low.dim() == 3 and low.shape == high.shape and q.shape[3] == low.shape[2]
    if not fits or q.shape[2] != 1 or low.shape[1] == 0 or q.shape[1] % low.shape[1]:
        fail(
            "page_bounds",
            f"q {list(q.shape)}, low {list(low.shape)}, high {list(high.shape)} must be [B, H, 1, D] and "
            "[N, Hkv, D] with H a multiple of Hkv",
        )
    if not q.dtype == low.dtype == high.dtype or not q.dtype.is_floating_point:
        fail("page_bounds", f"q {q.dtype}, low {low.dtype}, high {high.dtype} must be one floating dtype")
    if page < 1 or group not in ("max", "sum"):
        fail("page_bounds", f"page = {page} must be positive and group = {group!r} max or sum")
    check_index("page_bounds", "page_table", page_table, torch.int32, 2, q.shape[0])
    check_index("page_bounds", "lengths", lengths, torch.int64, 1, q.shape[0])
    check_index("page_bounds", "first", first, torch.int64, 1, q.shape[0])


def _fake_bounds(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    page: int,
    first: Tensor | None = None,
    group: str = "max",
) -> Tensor:
    _check_bounds(q, low, high, page_table, lengths, page, first, group)
    return q.new_empty((q.shape[0], low.shape[1], page_table.shape[1]), dtype=wide(q))


@define(
    "page_bounds(Tensor q, Tensor low, Tensor high, Tensor page_table, Tensor lengths, int page, "
    'Tensor? first=None, str group="max") -> Tensor',
    flops=lambda q, low, high, page_table, *_, out, **__: 4 * q.numel() * page_table.shape[1],
    fake=_fake_bounds,
)
def page_bounds(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    page: int,
    first: Tensor | None = None,
    group: str = "max",
) -> Tensor:
    """An upper bound of q . k over the keys of every page: sum over d of max(q_d low_d, q_d high_d).

    q [B, H, 1, D], low and high [N, Hkv, D] as `paged_append` keeps them, `page` tokens a page -> [B, Hkv,
    n]: the most (or the sum) over the query heads of a group; -inf where a page holds no token.
    """
    _check_bounds(q, low, high, page_table, lengths, page, first, group)
    at = page_table.clamp(min=0).long()
    rows = q[:, :, 0].to(wide(q)).unflatten(1, (low.shape[1], -1))[:, :, :, None]
    least, most = (x[at].transpose(1, 2).to(wide(q))[:, :, None] for x in (low, high))
    score = torch.maximum(rows * least, rows * most).sum(-1)
    score = score.amax(2) if group == "max" else score.sum(2)
    holds = held(page_table, page, lengths, first).unflatten(1, (-1, page)).any(-1)
    return score.masked_fill(~holds[:, None], -math.inf)


def _fake_top(bounds: Tensor, count: int) -> Tensor:
    if bounds.dim() != 3 or not bounds.dtype.is_floating_point or count < 1:
        fail(
            "top_pages", f"bounds {list(bounds.shape)} must be floating [B, Hkv, n], count = {count} positive"
        )
    return bounds.new_empty((*bounds.shape[:2], min(count, bounds.shape[2])), dtype=torch.int32)


@define(
    "top_pages(Tensor bounds, int count) -> Tensor",
    flops=lambda bounds, count, *, out: bounds.numel(),
    fake=_fake_top,
)
def top_pages(bounds: Tensor, count: int) -> Tensor:
    """`picked` for `paged_attention`: where the `count` greatest of each row of bounds [B, Hkv, n] are.

    int32 [B, Hkv, min(count, n)], ascending; entries of -inf are not taken, -1 stands at the end instead. Of
    equal bounds the first are taken; a NaN is above every number.
    """
    _fake_top(bounds, count)
    best = torch.sort(bounds, dim=-1, descending=True, stable=True)
    places, end = best.indices[..., :count], bounds.shape[2]
    places = torch.where(best.values[..., :count] == -math.inf, end, places).sort(-1).values
    return torch.where(places == end, -1, places).to(torch.int32)
