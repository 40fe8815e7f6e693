"""Time decode attention of a batch with a shared prefix on this CPU: all sides in turn, the least counts.

One layer of SmolLM2's shape (9 query heads over 3 key heads of 64, float32), one new token of every sequence,
the caches of several layers in rotation so that none is found in a processor cache. Sides: what a graph with
a static cache does (repeat the keys, attend under a boolean mask), torch's grouped attention, pages of every
sequence's own, the same pages shared but read for each, and relay attention. Bytes are those of the keys and
values that all queries name: tokens attended together count once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.frontends.kv_layer import run, write
from tilewright.frontends.kv_relay import RelayLayer
from tilewright.kernels.common.bench import interleave
from tilewright.passes.memory.relay_attention import RelayAttention
from tilewright.runtime.kv_store.pool import PagePool
from tilewright.runtime.kv_store.view import LayerView

HEADS, KEY_HEADS, SIZE = 9, 3, 64
SCALE = SIZE**-0.5
GOALS = {"bytes": 10.0, "static cache": 5.0}
"""Least ratios of a side to relay attention, for the sizes that are the defaults."""


class Rotation:
    """The cache of one layer three times: plain rows [B, Hkv, S, D], pages of its own for every sequence, and
    pages shared by a layer that attends to them together or not."""

    def __init__(self, batch: int, prefix: int, own: int, page: int) -> None:
        k, v = torch.randn(2, 1, KEY_HEADS, prefix, SIZE).unbind()
        new_k, new_v = torch.randn(2, batch, KEY_HEADS, own, SIZE).unbind()
        self.k, self.v = (
            torch.cat([x.expand(batch, -1, -1, -1), new], 2) for x, new in ((k, new_k), (v, new_v))
        )
        kind = {"page": page, "dtype": torch.float32, "device": torch.device("cpu")}
        alone = LayerView(PagePool(KEY_HEADS, SIZE, SIZE, **kind), batch, write)  # type: ignore[arg-type]
        alone.append(self.k, self.v)
        self.alone = alone
        self.relay = RelayLayer(0, page, lambda: None, RelayAttention())
        self.relay.lazy_initialization(k, v)
        self.relay.view.append(k, v)
        self.relay.select_rows([0] * batch)
        self.relay.view.append(new_k, new_v)


def attend(q: Tensor, view: LayerView) -> Tensor:
    """Every sequence for itself."""
    out: Tensor
    pool = view.pool
    out, _ = run("paged_attention", q, pool.k_pages, pool.v_pages, *view.tables(), None, None, SCALE)
    return out


def repeated(x: Tensor) -> Tensor:
    """Keys as the captured graph has them: one copy per query head."""
    return x[:, :, None].expand(-1, -1, HEADS // KEY_HEADS, -1, -1).flatten(1, 2)


def sides(layers: list[Rotation], q: Tensor) -> dict[str, Callable[[int], Tensor]]:
    """What is timed, by name; each takes the number of a layer."""
    mask = torch.ones(len(q), 1, 1, layers[0].k.shape[2], dtype=torch.bool)
    return {
        "static cache": lambda i: F.scaled_dot_product_attention(
            q, repeated(layers[i].k), repeated(layers[i].v), attn_mask=mask
        ),
        "torch grouped": lambda i: F.scaled_dot_product_attention(
            q, layers[i].k, layers[i].v, enable_gqa=True
        ),
        "own pages": lambda i: attend(q, layers[i].alone),
        "shared pages": lambda i: attend(q, layers[i].relay.view),
        "relay": lambda i: layers[i].relay.dense(q, None, SCALE),
    }


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 when a goal is missed or two sides differ."""
    parser = argparse.ArgumentParser(prog="bench_relay", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=2048, help="tokens shared")
    parser.add_argument("--own", type=int, default=64, help="tokens of every sequence behind them")
    parser.add_argument("--page", type=int, default=16, help="tokens of a page")
    parser.add_argument("--layers", type=int, default=3, help="caches in rotation")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    layers = [
        Rotation(options.batch, options.prefix, options.own, options.page) for _ in range(options.layers)
    ]
    timed = sides(layers, torch.randn(options.batch, HEADS, 1, SIZE))
    with torch.inference_mode():
        want = timed["torch grouped"](0)
        apart = max(float((side(0) - want).abs().max()) for side in timed.values())
        seconds = interleave(timed, options.layers, options.rounds)
    shared = options.prefix // options.page * options.page
    every = options.batch * (options.prefix + options.own)
    ratios = {"bytes": every / (every - (options.batch - 1) * shared)}
    ratios |= {name: time / seconds["relay"] for name, time in seconds.items() if name != "relay"}
    print(
        f"batch {options.batch}, {options.prefix} tokens shared, {options.own} own, sides {apart:.1e} apart"
    )
    for name, time in seconds.items():
        print(f"{name:<14} {time * 1e6:>8.0f} us")
    judged = options.batch == 16 and options.prefix == 2048
    missed = [name for name, goal in GOALS.items() if judged and ratios[name] < goal]
    for name, ratio in ratios.items():
        goal = f", goal {GOALS[name]:.0f}{' MISSED' if name in missed else ''}" if name in GOALS else ""
        print(f"{name:<14} {ratio:.2f} x relay{goal if judged else ''}")
    return 1 if missed or apart > 1e-5 else 0


if __name__ == "__main__":
    sys.exit(main())
