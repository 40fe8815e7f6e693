"""hadamard as a kernel family: selection, shapes, gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.hadamard import transform
from tilewright.kernels.common.family import (
    KernelFamily,
    TritonKernel,
    check_target,
    config_of,
    dtype_name,
    make_key,
)
from tilewright.kernels.hadamard import cpp, triton
from tilewright.runtime.contracts import KernelKey, Refusal, Target

DTYPES = ("float32", "bfloat16", "float16")
LEGALITY = (
    "x is float32, bfloat16 or float16 and its last axis is a known multiple of block",
    "block is the order of base (1 when absent) times a power of two",
    f"block is at most {cpp.MAX_BLOCK}, on a GPU {triton.MAX_BLOCK}",
    f"on a GPU a base has order at most {triton.MAX_ORDER} and the power of two is at least {triton.MIN_DOT}",
    "base and signs are absent or float32; the order of base is a multiple of 4",
    "inputs that are not contiguous are copied inside the op",
)


def _configure(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    x, block, base, signs, inverse = args
    refused = check_target([t for t in (x, base, signs) if t is not None], target)
    if refused is not None:
        return refused
    dtype = dtype_name(x, DTYPES, "x")
    if isinstance(dtype, Refusal):
        return dtype
    if x.dim() == 0 or not isinstance(x.shape[-1], int):
        return Refusal("the last axis of x is not known when compiling")
    for name, value, shape in (("base", base, None), ("signs", signs, [x.shape[-1]])):
        if value is not None and (value.dtype != torch.float32 or shape not in (None, list(value.shape))):
            return Refusal(f"{name} is {list(value.shape)} {value.dtype}; float32 is wanted")
    order = 1 if base is None else int(base.shape[0])
    problem = _sizes(x.shape[-1], block, order, None if base is None else list(base.shape), target)
    if problem:
        return Refusal(problem)
    return make_key(
        "hadamard", target, dtype, block=block, order=order, signs=signs is not None, inverse=bool(inverse)
    )


def _sizes(size: int, block: int, order: int, shape: list[int] | None, target: Target) -> str:
    """What is wrong with the sizes, empty when nothing is."""
    power = block // order if order else 0
    if shape is not None and (shape != [order, order] or order % 4):
        return f"base is {shape}; it must be square, of an order that is a multiple of 4"
    if power < 1 or power * order != block or power & (power - 1) or size % block:
        return (
            f"block {block} of {size} channels is not {order} times a power of two, or does not divide them"
        )
    limit = cpp.MAX_BLOCK if target.kind == "cpu" else triton.MAX_BLOCK
    if block > limit:
        return f"block {block} is larger than {limit}"
    if target.kind != "cpu" and order > 1 and (order > triton.MAX_ORDER or power < triton.MIN_DOT):
        return (
            f"base of order {order} with a power of two of {power}; on a GPU at most {triton.MAX_ORDER} and "
            f"at least {triton.MIN_DOT}"
        )
    return ""


def _rewrite_args(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
    x, _, base, signs, _ = args
    return tuple(v for v in (x, base, signs) if v is not None)


def _fake(key: KernelKey) -> Callable[..., Any]:
    def fake(x: Tensor, *rest: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    return fake


def _save(key: KernelKey) -> Callable[..., None]:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    return save


def _backward(key: KernelKey) -> Callable[..., Any]:
    """The transform is orthogonal: the gradient goes through its inverse."""
    config = config_of(key)

    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        rest = list(ctx.saved_tensors)
        base = rest.pop(0) if config["order"] > 1 else None
        signs = rest.pop(0) if config["signs"] else None
        dx = transform(dy.float(), config["block"], base, signs, not config["inverse"]).to(dy.dtype)
        return (dx, *[None] * len(ctx.saved_tensors))

    return backward


def _examples() -> Sequence[tuple[Any, ...]]:
    made: list[tuple[Any, ...]] = []
    for dtype, size, order, inverse in (
        (torch.float32, 1536, 12, False),
        (torch.bfloat16, 4096, 1, False),
        (torch.float16, 576, 36, True),
    ):
        x = torch.empty(4, size, dtype=dtype, device="meta")
        base = torch.empty(order, order, device="meta") if order > 1 else None
        signs = torch.empty(size, device="meta") if inverse else None
        made.append((x, size, base, signs, inverse))
    return made


HADAMARD = KernelFamily(
    op="hadamard",
    dtypes=DTYPES,
    legality=LEGALITY,
    configure=_configure,
    schema=cpp.schema,
    generate={"cpu": cpp.generate, "cuda": triton.generate, "hip": triton.generate},
    triton=TritonKernel(triton.parameters, triton.constants, triton.warps, triton.launcher),
    fake=_fake,
    save=_save,
    backward=_backward,
    rewrite_args=_rewrite_args,
    examples=_examples,
)
