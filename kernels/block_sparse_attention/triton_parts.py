"""What the generated forward and backward share: predicates and sizes as text, tables of tiles."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.block_layout import Kind
from tilewright.kernels.block_sparse_attention.signature import kinds_of, options_of
from tilewright.kernels.common.triton_text import next_power_of_2
from tilewright.runtime.contracts import KernelKey

POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def extra_sizes(key: KernelKey) -> list[str]:
    """Names of the strides of what is optional."""
    config = options_of(key)
    found = [f"{name}_step" for name in ("src_q", "src_k") if config[name]]
    found += ["q_scales", "k_scales"] if codes_of(key) else []
    return found + (["mask_b", "mask_h", "mask_i", "mask_j"] if config["mask"] else [])


@dataclass(frozen=True)
class Codes:
    """What queries and keys are rounded to before their products."""

    name: str
    kind: torch.dtype
    element: str
    """Triton's name of it."""
    zero: str


_CODES = {
    "block_sparse_attention_int8": Codes("int8", torch.int8, "i8", "0"),
    "block_sparse_attention_fp8": Codes("fp8", torch.float8_e4m3fn, "fp8e4nv", "0.0"),
}


def codes_of(key: KernelKey) -> Codes | None:
    """What the scores are products of; None where queries and keys are taken as they are."""
    return _CODES.get(key.op)


def dims_of(key: KernelKey) -> dict[str, Any]:
    """Head sizes D and E, the powers of two BD and BE that hold them, and whether those are larger."""
    config = options_of(key)
    head, value = config["head"], config["value"]
    block_d = max(32 if codes_of(key) else 16, next_power_of_2(head))  # the least a product sums over
    block_e = max(16, next_power_of_2(value))
    return {
        "D": head,
        "E": value,
        "BD": block_d,
        "BE": block_e,
        "d_real": block_d != head,
        "e_real": block_e != value,
    }


_RULES = {
    Kind.BAND: """u{p} = (i + shift{p}) // unit{p}
w{p} = j // unit{p}
near{p} = (w{p}[None, :] <= u{p}[:, None] + after{p}) & (w{p}[None, :] >= u{p}[:, None] - before{p})
pass{p} = near{p} | (j < sink{p})[None, :]""",
    Kind.CAUSAL: """u{p} = (i + shift{p}) // unit{p}
w{p} = j // unit{p}
near{p} = (w{p}[None, :] >= u{p}[:, None] - before{p}) | (j < sink{p})[None, :]
pass{p} = (w{p}[None, :] <= u{p}[:, None] + after{p}) & near{p}""",
    Kind.SLOT: "pass{p} = (j % unit{p} < before{p})[None, :]",
    Kind.PAD_SELF: "pass{p} = (i + shift{p} < pad)[:, None] == (j < pad)[None, :]",
    Kind.USER: """at{p} = i[:, None].to(tl.int64) * mask_i + j[None, :] * mask_j
both{p} = real[:, None] & inside[None, :]
pass{p} = tl.load(mask + b * mask_b + h * mask_h + at{p}, mask=both{p}, other=0) != 0""",
}


def kept_pairs(key: KernelKey, *, keys_first: bool = False) -> tuple[list[str], str]:
    """(lines, condition): which pairs of slots i and j an entry of this `kind` keeps; always, without kinds.

    The condition is [i, j], or [j, i] when keys come first. It reads i, j, real, inside, b and h.
    """
    kinds = kinds_of(key)
    lines = [line for p, kind in enumerate(kinds, 1) for line in _RULES[kind].format(p=p).splitlines()]
    if keys_first:
        swap = {"[None, :]": "[:, None]", "[:, None]": "[None, :]"}
        lines = [re.sub(r"\[None, :\]|\[:, None\]", lambda found: swap[found[0]], line) for line in lines]
    any_kind = [f"((kind == {p}) & pass{p})" for p in range(1, len(kinds) + 1)]
    return lines, " | ".join(["(kind == 0)", *any_kind]) if kinds else ""


def tile_tables(q_off: Tensor, slots: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(block, first slot, end slot) of every tile of at most `rows` slots, int32 [1 or G, tiles].

    Blocks are cut into tiles; `tiles` is a bound that needs no data, surplus tiles are empty.
    """
    count = (q_off.diff(dim=1) + rows - 1) // rows
    ends = count.cumsum(1)
    tiles = q_off.shape[1] - 1 + -(-slots // rows)
    index = torch.arange(tiles, device=q_off.device).expand(q_off.shape[0], -1).contiguous()
    block = torch.searchsorted(ends.contiguous(), index, right=True)
    used = block < count.shape[1]
    block = torch.where(used, block, 0)
    first = q_off.gather(1, block) + (index - (ends - count).gather(1, block)) * rows
    last = torch.minimum(q_off.gather(1, block + 1), first + rows)
    last = torch.where(used, last, first)
    return tuple(t.to(torch.int32).contiguous() for t in (block, first, last))  # type: ignore[return-value]


def mask_steps(mask: Tensor) -> list[int]:
    """Strides of a USER mask; 0 where an axis of size 1 stands for all."""
    return [step if size > 1 else 0 for size, step in zip(mask.shape, mask.stride(), strict=True)]


def group_step(table: Tensor) -> int:
    """Elements between the rows of two groups; 0 where one row stands for all."""
    return table.shape[1] if table.shape[0] > 1 else 0
