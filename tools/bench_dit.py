"""Time a whole video transformer with sliding-tile attention against eager and Inductor on this machine.

A diffusers WanTransformer3DModel with random weights, 12 heads of 64, 6,912 tokens (12 x 24 x 24). All sides
take turns in one process; the least time of several rounds counts. The token order is hoisted out of the
transformer, so what it costs is two gathers of the whole hidden state a forward.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tilewright.compiler.tiles import tile_grid, window_density
from tilewright.frontends.commands.shared import timed
from tilewright.frontends.compile import REPORTS

GRID, TILE = (12, 24, 24), (2, 8, 8)
HEADS, SIZE, FEED_FORWARD = 12, 64, 3072
WINDOWS = {"1/6": (3, 1, 3), "1/18": (3, 1, 1), "1/2": (3, 3, 3)}


def transformer(layers: int) -> nn.Module:
    """The model, with the same random weights every time."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    module: nn.Module = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=SIZE,
        num_layers=layers,
        ffn_dim=FEED_FORWARD,
        text_dim=256,
        freq_dim=256,
    )
    return module.eval().requires_grad_(False)


def example() -> dict[str, Any]:
    """One call: latents [1, 16, 12, 48, 48], one timestep, 64 text tokens."""
    generator = torch.Generator().manual_seed(1)
    frames, rows, columns = GRID
    return {
        "hidden_states": torch.randn(1, 16, frames, 2 * rows, 2 * columns, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 64, 256, generator=generator),
        "return_dict": False,
    }


def six_layers() -> tuple[nn.Module, tuple[Any, ...]]:
    """Six layers and a call with 1,152 tokens, for `bench_compile tilewright.tools.bench_dit:six_layers`."""
    frames, rows, columns = 2, *GRID[1:]
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, frames, 2 * rows, 2 * columns, generator=generator)
    return transformer(6), (
        latents,
        torch.tensor([500]),
        torch.randn(1, 64, 256, generator=generator),
        None,
        False,
    )


def compiled(module: nn.Module, pipeline: str) -> Callable[..., Any]:
    """The module behind our backend, from a clean slate."""
    torch._dynamo.reset()
    return torch.compile(module, backend="tilewright", options={"pipeline": pipeline})


def order_seconds() -> float:
    """What the hoisted order costs a forward: the hidden state gathered into tile order and back."""
    tiling = tile_grid(GRID, TILE)
    assert tiling is not None
    order = tiling.table()
    hidden = torch.randn(1, math.prod(GRID), HEADS * SIZE)
    return 2 * min(timed(partial(torch.index_select, hidden, 1, order)) for _ in range(5))


def main(argv: list[str] | None = None) -> int:
    """Print the table, or JSON; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m tilewright.tools.bench_dit", description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--density", choices=WINDOWS, default="1/6")
    parser.add_argument("--linears", default="", metavar="P", help="further passes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    window = WINDOWS[args.density]
    tile, size = ("x".join(map(str, t)) for t in (TILE, window))
    sparse = f"sliding-tile-attention{{tile={tile},window={size}}},hoist-token-permutation"
    module, call = transformer(args.layers), example()
    sides: dict[str, Callable[..., Any]] = {
        "eager": module,
        "inductor": torch.compile(transformer(args.layers)),
        "exact": compiled(transformer(args.layers), "exact"),
        "sparse": compiled(transformer(args.layers), ",".join(filter(None, ("exact", sparse, args.linears)))),
    }
    seconds = dict.fromkeys(sides, math.inf)
    with torch.no_grad():
        for run in sides.values():
            run(**call)
        for name in ("sliding-tile-attention", "hoist-token-permutation"):
            if not REPORTS[-1].applied(name):
                raise SystemExit(f"{name} was not applied")
        for _ in range(args.rounds):
            for name, run in sides.items():
                seconds[name] = min(seconds[name], timed(partial(run, **call)))
    tiling = tile_grid(GRID, TILE)
    assert tiling is not None
    order = order_seconds()
    data = {
        "layers": args.layers,
        "tokens": math.prod(GRID),
        "density": float(window_density(tiling, window)),
        "seconds": seconds,
        "over_eager": seconds["eager"] / seconds["sparse"],
        "over_inductor": seconds["inductor"] / seconds["sparse"],
        "order_share": order / seconds["sparse"],
    }
    if args.json:
        sys.stdout.write(json.dumps(data) + "\n")
        return 0
    rows = [f"{name:<10} {value * 1e3:9.0f} ms" for name, value in seconds.items()]
    rows.append(
        f"sparse: {data['over_eager']:.2f}x eager, {data['over_inductor']:.2f}x Inductor; "
        f"token order {data['order_share']:.2%} of a forward"
    )
    sys.stdout.write("\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
