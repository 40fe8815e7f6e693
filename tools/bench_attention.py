"""Time block-sparse attention against dense attention, gathered windows and FlexAttention on this machine.

All sides take turns in one process; the least time of several rounds counts. `eff` is the speed-up over dense
attention times the density: above 1 the kernel is faster per computed pair than dense attention is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.compiler.block_layout import FAR, BlockLayout
from tilewright.kernels.table import KernelChoice, host_target, select_for_node

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A video grid cut into tiles with a window of tiles, or a causal window over `keys` tokens."""

    name: str
    heads: tuple[int, int]
    size: int
    tokens: int
    layout: BlockLayout
    gather: Tensor | None = None
    """[tiles, tiles in the window]: the key tiles of each query tile."""
    causal: bool = False
    window: int = FAR
    sink: int = 0


def axis_window(tiles: int, window: int) -> list[list[int]]:
    """Key tiles of each query tile along one axis: the window slides inwards at the border."""
    reach = window // 2
    if 2 * reach + 1 >= tiles:
        return [list(range(tiles))] * tiles
    centres = [min(max(i, reach), tiles - 1 - reach) for i in range(tiles)]
    return [list(range(c - reach, c + reach + 1)) for c in centres]


def tile_case(
    grid: tuple[int, ...], tile: tuple[int, ...], window: tuple[int, ...], heads: int, size: int
) -> Case:
    """Sliding tile attention on a grid that the tile divides, tokens in tile order."""
    counts = [g // t for g, t in zip(grid, tile, strict=True)]
    near = [axis_window(n, w) for n, w in zip(counts, window, strict=True)]
    rows = [
        [(x * counts[1] + y) * counts[2] + z for x in near[0][a] for y in near[1][b] for z in near[2][c]]
        for a in range(counts[0])
        for b in range(counts[1])
        for c in range(counts[2])
    ]
    gather, volume = torch.tensor(rows), tile[0] * tile[1] * tile[2]
    mask = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    mask[torch.arange(len(rows))[:, None], gather] = True
    borders = list(range(0, len(rows) * volume + 1, volume))
    layout = BlockLayout.from_block_mask(mask, borders, borders, heads)
    name = f"{'x'.join(map(str, grid))} tile {'x'.join(map(str, tile))} window {'x'.join(map(str, window))}"
    return Case(name, (heads, heads), size, len(rows) * volume, layout, gather)


def causal_case(tokens: int, heads: tuple[int, int], size: int, window: int, sink: int) -> Case:
    """Causal prefill with a window and sinks; window FAR is dense causal."""
    layout = BlockLayout.causal(tokens, tokens, heads[0], window=window, sink=sink)
    name = f"causal {tokens}" + ("" if window == FAR else f" window {window} sink {sink}")
    return Case(name, heads, size, tokens, layout, None, True, window, sink)


def cases(which: str) -> Iterator[Case]:
    """The published shapes, in groups."""
    small, large = (12, 24, 24), (16, 32, 32)
    if which == "tiles":
        for window in ((3, 3, 3), (3, 1, 3), (3, 1, 1)):
            yield tile_case(small, (2, 8, 8), window, 4, 64)
        for window in ((3, 3, 3), (3, 1, 3), (3, 1, 1)):
            yield tile_case(small, (2, 8, 8), window, 4, 128)
    elif which == "full":
        for size in (64, 128):
            yield tile_case(small, (2, 8, 8), (6, 3, 3), 4, size)
    elif which == "large":
        yield tile_case(large, (2, 8, 8), (3, 1, 3), 4, 64)
        yield tile_case(large, (4, 8, 8), (3, 1, 1), 2, 128)
    else:
        yield causal_case(8192, (9, 3), 64, 1024, 16)
        yield causal_case(8192, (9, 3), 64, FAR, 0)


def kernel(op: str, *args: Any) -> Run:
    """A call of the generated kernel; SystemExit where none fits."""
    choice = select_for_node(op, args, host_target(), training=False)
    if not isinstance(choice, KernelChoice):
        raise SystemExit(f"{op}: {choice}")
    given, _ = choice.rewrite_args(args)
    call = choice.op
    return lambda: call(*given)


def _gathered(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
    assert case.gather is not None
    (tiles, near), heads = case.gather.shape, case.heads[0]
    volume = case.tokens // tiles

    def windows(x: Tensor) -> Tensor:
        picked = x.view(heads, tiles, volume, case.size)[:, case.gather]
        return picked.reshape(heads * tiles, 1, near * volume, case.size)

    def run() -> Tensor:
        out = F.scaled_dot_product_attention(
            q.view(heads * tiles, 1, volume, case.size), windows(k), windows(v)
        )
        return out.view_as(q)

    return run


def _flex(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block = 128 if case.gather is None else case.tokens // len(case.gather)
    if case.causal:

        def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & ((i - j < case.window) | (j < case.sink))

    else:
        assert case.gather is not None
        allowed = torch.zeros(len(case.gather), len(case.gather), dtype=torch.bool)
        allowed[torch.arange(len(allowed))[:, None], case.gather] = True

        def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return allowed[i // block, j // block]

    mask = create_block_mask(rule, None, None, case.tokens, case.tokens, device="cpu", BLOCK_SIZE=block)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=case.heads[0] != case.heads[1])


def sides(case: Case, flex: bool) -> dict[str, Run]:
    """What is timed, by name; `ours` is checked against another exact side first."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, case.tokens, case.size) for h in (case.heads[0], *[case.heads[1]] * 2))
    gqa = case.heads[0] != case.heads[1]
    found: dict[str, Run] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=gqa),
        "ours": kernel("block_sparse_attention", q, k, v, *case.layout.arguments(), None),
    }
    whole = case.window == FAR if case.causal else len(case.gather) == case.gather.shape[1]  # type: ignore[arg-type,union-attr]
    if whole:
        found["attention"] = kernel("attention", q, k, v, None, None, case.causal, 0.0, None)
    elif case.gather is not None:
        found["gather"] = _gathered(case, q, k, v)
    if flex:
        found["flex"] = _flex(case, q, k, v)
    other = next((found[n] for n in ("gather", "flex") if n in found), found["dense"] if whole else None)
    if other is not None:
        torch.testing.assert_close(found["ours"]()[0], other(), rtol=1e-4, atol=2e-5)
    return found


def searches(rounds: int) -> Iterator[str]:
    """A line per head size: what a search for blocks costs, in dense attentions.

    The first search attends densely and sums the probabilities of blocks of 64; a later one sums alone, with
    the lse of the search before. Selecting the blocks is not in it.
    """
    for size in (64, 128):
        q, k, v = (torch.randn(1, 4, 6912, size) for _ in range(3))
        layout = BlockLayout.dense(6912, 6912, 4).arguments()
        attend = kernel("block_sparse_attention", q, k, v, *layout, None)
        lse, ends = attend()[1], torch.arange(0, 6913, 64, dtype=torch.int32)[None]
        runs: dict[str, Run] = {
            "dense": partial(F.scaled_dot_product_attention, q, k, v),
            "attention": kernel("attention", q, k, v, None, None, False, 0.0, None),
            "with lse": attend,
            "mass": kernel("block_mass", q, k, lse, ends, ends, None, None),
        }
        torch.testing.assert_close(
            runs["mass"]().sum(-1), torch.full((1, 4, 108), 64.0), rtol=1e-4, atol=1e-3
        )
        t = measure(runs, rounds)
        whole, times = t["with lse"] + t["mass"], " ".join(f"{name} {1e3 * s:.1f}" for name, s in t.items())
        shares = [
            f"{what}: first {whole / t[n]:.2f} later {t['mass'] / t[n]:.2f}" for n, what in _ONE.items()
        ]
        yield f"search 6912 H=4 D={size} | ms: {times} | {', '.join(shares)}"


_ONE = {"attention": "of our dense attention", "dense": "of torch's"}


def measure(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Least seconds of each side over interleaved rounds."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def line(case: Case, seconds: dict[str, float]) -> str:
    """One line: times and the ratios that the goals are about."""
    density = case.layout.density()
    share = density * 2 * case.tokens / (case.tokens + 1) if case.causal else density
    dense, ours = seconds["dense"], seconds["ours"]
    times = " ".join(f"{name} {1e3 * t:.1f}" for name, t in seconds.items())
    ratios = " ".join(f"{name}/ours {t / ours:.2f}" for name, t in seconds.items() if name != "ours")
    gflops = 4 * case.heads[0] * case.tokens**2 * case.size * density / ours / 1e9
    text = f"{case.name} H={case.heads[0]}/{case.heads[1]} D={case.size} density {share:.3f}"
    return f"{text} | ms: {times} | {ratios} | eff {dense / ours * share:.2f} {gflops:.1f} GF"


def main(argv: list[str] | None = None) -> int:
    """Print a line per case."""
    parser = argparse.ArgumentParser(prog="bench_attention", description=(__doc__ or "").splitlines()[0])
    groups = ("tiles", "full", "large", "causal", "search")
    parser.add_argument("--group", action="append", choices=groups, help="only these shapes; may repeat")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flex", action="store_true", help="also time compiled FlexAttention")
    options = parser.parse_args(argv)
    with torch.inference_mode():
        for group in options.group or groups:
            if group == "search":
                for text in searches(options.rounds):
                    print(text, flush=True)
                continue
            for case in cases(group):
                torch._dynamo.reset()
                print(line(case, measure(sides(case, options.flex), options.rounds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
