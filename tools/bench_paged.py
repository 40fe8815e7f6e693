"""Time decode attention over a paged cache on this CPU: every side in turn in one process, the least counts.

One layer of SmolLM2's shape (9 query heads over 3 key heads of 64, float32), one new token, the caches of
many layers in rotation so that none is found in a processor cache. Sides: what a graph with a static cache
does (repeat the keys, attend all of the capacity under a boolean mask), torch's grouped attention without a
mask, all pages, the same pages as codes of 8 and 4 bits, an eighth of the pages picked by their bounds, and
the append. The plain read is a sum in 4 streams a thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.compiler.ops.packed import pack_rows
from tilewright.kernels.common.bench import interleave
from tilewright.kernels.paged.call import callable_for
from tilewright.tools.bench_quantized import read_op

HEADS, KEY_HEADS, SIZE = 9, 3, 64
GOALS = {"static cache": 3.3, "8 bits": 1.0, "4 bits": 1.0, "picked": 4.0, "append": 0.03}
"""All pages over a static cache, codes and picked pages (selection included) over all pages, and the most
that append may be of attention and append together; set for GOAL_TOKENS tokens."""
GOAL_TOKENS = 8192


@dataclass(frozen=True)
class Layer:
    """The cache of one layer: plain rows [1, Hkv, S, D], pages with their extremes, pages of codes."""

    k: Tensor
    v: Tensor
    k_pages: Tensor
    v_pages: Tensor
    low: Tensor
    high: Tensor
    packed: dict[int, tuple[Tensor, Tensor]]

    @classmethod
    def random(cls, capacity: int, page: int) -> Layer:
        """A full cache of `capacity` tokens."""
        k, v = torch.randn(2, 1, KEY_HEADS, capacity, SIZE).unbind()
        keys, values = (x[0].unflatten(1, (-1, page)).transpose(0, 1).contiguous() for x in (k, v))
        packed = {bits: (pack_rows(keys, bits, 0), pack_rows(values, bits, 0)) for bits in (8, 4)}
        return cls(k, v, keys, values, keys.amin(2), keys.amax(2), packed)


def repeated(x: Tensor) -> Tensor:
    """Keys as the captured graph has them: one copy per query head."""
    share = HEADS // KEY_HEADS
    return x[:, :, None].expand(-1, -1, share, -1, -1).flatten(1, 2)


def sides(layers: list[Layer], held: int, page: int, share: int) -> dict[str, Callable[[int], object]]:
    """What is timed, by name; each takes the number of a layer."""
    capacity = layers[0].k.shape[2]
    q, row = torch.randn(1, HEADS, 1, SIZE), torch.randn(1, KEY_HEADS, 1, SIZE)
    table = torch.randperm(capacity // page).to(torch.int32)[None]
    used = table[:, : -(-held // page)].contiguous()
    lengths, starts = torch.tensor([held]), torch.tensor([held - 1])
    mask = (torch.arange(capacity) < held)[None, None, None]
    count = max(1, used.shape[1] // share)

    def all_args(i: int) -> tuple[Tensor, ...]:
        return q, layers[i].k_pages, layers[i].v_pages, used, lengths

    def code_args(i: int, bits: int) -> tuple[Tensor | int, ...]:
        return q, *layers[i].packed[bits], used, lengths, bits

    def pick_args(i: int) -> tuple[Tensor | int, ...]:
        return q, layers[i].low, layers[i].high, used, lengths, page, count

    def append_args(i: int) -> tuple[Tensor, ...]:
        x = layers[i]
        return x.k_pages, x.v_pages, table, starts, row, row, x.low, x.high

    attend = callable_for("paged_attention", all_args(0))
    codes = {bits: callable_for("packed_attention", code_args(0, bits)) for bits in (8, 4)}
    chosen = torch.zeros(1, KEY_HEADS, count, dtype=torch.int32)
    some = callable_for("paged_attention", (*all_args(0), None, chosen))
    pick = callable_for("pick_pages", pick_args(0))
    append = callable_for("paged_append", append_args(0))

    def picked(i: int) -> object:
        return some(*all_args(i), None, pick(*pick_args(i)))

    return {
        "static cache": lambda i: F.scaled_dot_product_attention(
            q, repeated(layers[i].k), repeated(layers[i].v), attn_mask=mask
        ),
        "torch grouped": lambda i: F.scaled_dot_product_attention(
            q, layers[i].k[:, :, :held], layers[i].v[:, :, :held], enable_gqa=True
        ),
        "all pages": lambda i: attend(*all_args(i)),
        "8 bits": lambda i: codes[8](*code_args(i, 8)),
        "4 bits": lambda i: codes[4](*code_args(i, 4)),
        "picked": picked,
        "append": lambda i: append(*append_args(i)),
    }


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(prog="bench_paged", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens held")
    parser.add_argument("--capacity", type=int, default=8192, help="of the static cache")
    parser.add_argument("--page", type=int, default=16, help="tokens of a page")
    parser.add_argument("--share", type=int, default=8, help="one page in so many is picked")
    parser.add_argument("--layers", type=int, default=6, help="caches in rotation")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    layers = [Layer.random(options.capacity, options.page) for _ in range(options.layers)]
    timed = sides(layers, options.tokens, options.page, options.share)
    bytes_held = 2 * 4 * KEY_HEADS * SIZE * options.tokens
    read = read_op()
    timed["plain read"] = lambda i: (read(layers[i].k), read(layers[i].v))
    with torch.inference_mode():
        seconds = interleave(timed, options.layers, options.rounds)
    whole = seconds["all pages"]
    print(f"{options.tokens} tokens of {options.capacity}, pages of {options.page}")
    for name, time in seconds.items():
        print(f"{name:<14} {time * 1e6:>8.0f} us {bytes_held / time / 1e9:>7.1f} GB/s of all keys and values")
    ratios = {
        "static cache": seconds["static cache"] / whole,
        **{name: whole / seconds[name] for name in ("8 bits", "4 bits", "picked")},
        "append": seconds["append"] / (whole + seconds["append"]),
    }
    judged = GOALS if options.tokens == GOAL_TOKENS else {}
    missed = [n for n, goal in judged.items() if (ratios[n] > goal if n == "append" else ratios[n] < goal)]
    for name, ratio in ratios.items():
        goal = f", goal {GOALS[name]}{' MISSED' if name in missed else ''}" if judged else ""
        print(f"{name:<14} {ratio:.3f}{goal}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
