"""rms_norm and add_rms_norm as kernel families: selection, shapes, gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.ops.norm import SCALE_FIRST, SCALE_LAST
from tilewright.kernels.common.family import (
    DTYPE_NAMES,
    KernelFamily,
    TritonKernel,
    check_target,
    config_of,
    dtype_name,
    make_key,
)
from tilewright.kernels.rms_norm import cpp, triton
from tilewright.runtime.contracts import KernelKey, Refusal, Target

DTYPES = ("float32", "bfloat16", "float16")
LEGALITY = (
    "x is float32, bfloat16 or float16 with at least one axis",
    "weight is absent, or has one axis, and the dtype of x or float32",
    "residual has the shape and dtype of x",
    "eps and offset are numbers; sizes may be symbolic",
    "inputs that are not contiguous are copied inside the op",
    f"on a GPU the last axis is known and at most {triton.MAX_COLUMNS}",
)


def _configure(op: str, args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    residual = op == "add_rms_norm"
    x, other = args[0], (args[1] if residual else None)
    weight, eps, offset, rounding = args[2:6] if residual else args[1:5]
    tensors = [t for t in (x, other, weight) if t is not None]
    refused = check_target(tensors, target)
    if refused is not None:
        return refused
    dtype = dtype_name(x, DTYPES, "x")
    if isinstance(dtype, Refusal):
        return dtype
    if x.dim() == 0:
        return Refusal("x has no axes")
    if target.kind != "cpu" and not (isinstance(x.shape[-1], int) and x.shape[-1] <= triton.MAX_COLUMNS):
        return Refusal(
            f"the last axis of x is {x.shape[-1]}; on a GPU it must be known and <= {triton.MAX_COLUMNS}"
        )
    if other is not None and (
        other.dtype != x.dtype or other.dim() != x.dim() or list(other.shape) != list(x.shape)
    ):
        return Refusal(f"residual is {list(other.shape)} {other.dtype}, x is {list(x.shape)} {x.dtype}")
    name = "none"
    if weight is not None:
        if weight.dim() != 1 or weight.dtype not in (x.dtype, torch.float32):
            return Refusal(
                f"weight is {list(weight.shape)} {weight.dtype}; it must be [D] in {dtype} or float32"
            )
        name = DTYPE_NAMES[weight.dtype]
    if rounding not in (SCALE_FIRST, SCALE_LAST):
        return Refusal(f"rounding is {rounding!r}, the kernels know {SCALE_FIRST} and {SCALE_LAST}")
    if not all(isinstance(v, int | float) for v in (eps, offset)):
        return Refusal("eps or offset is not a number known when compiling")
    # In float32, and without a weight, both forms round alike: one kernel.
    last = rounding == SCALE_LAST and weight is not None and dtype != "float32"
    out = DTYPE_NAMES[torch.promote_types(x.dtype, weight.dtype)] if last else dtype
    return make_key(
        op,
        target,
        dtype,
        residual=residual,
        weight=name,
        out=out,
        offset=offset != 0.0 and weight is not None,
        rounding=SCALE_LAST if last else SCALE_FIRST,
    )


def _split(key: KernelKey, args: Sequence[Any]) -> dict[str, Any]:
    """The kernel op's positional arguments by name; what is off is absent."""
    config = config_of(key)
    names = ["x"] + (["residual"] if config["residual"] else [])
    names += (
        (["weight"] if config["weight"] != "none" else [])
        + ["eps"]
        + (["offset"] if config["offset"] else [])
    )
    return dict(zip(names, args, strict=True))


def _rewrite_args(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
    config = config_of(key)
    residual = config["residual"]
    weight, eps, offset = args[2:5] if residual else args[1:4]
    kept = list(args[: 2 if residual else 1])
    kept += ([weight] if config["weight"] != "none" else []) + [eps] + ([offset] if config["offset"] else [])
    return tuple(kept)


def _fake(key: KernelKey) -> Callable[..., Any]:
    config = config_of(key)
    out = getattr(torch, config["out"])

    def fake(x: Tensor, *args: Any) -> Any:
        y = torch.empty(x.shape, dtype=out, device=x.device)
        return (y, torch.empty(x.shape, dtype=x.dtype, device=x.device)) if config["residual"] else y

    return fake


def _save(key: KernelKey) -> Callable[..., None]:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        named = _split(key, inputs)
        total = output[1] if config_of(key)["residual"] else named["x"]
        ctx.save_for_backward(total, *([named["weight"]] if "weight" in named else []))
        ctx.eps, ctx.offset = named["eps"], named.get("offset", 0.0)

    return save


def _backward(key: KernelKey) -> Callable[..., Any]:
    """r = (mean(x^2) + eps)^-1/2, n = x r, g = dy (w + offset): dx = r (g - n mean(g n)), dw = sum(dy n)."""
    config = config_of(key)

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        total, *rest = ctx.saved_tensors
        x = total.float()
        dy = grads[0].float() if grads[0] is not None else torch.zeros_like(x)
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + ctx.eps)
        normed = x * rstd
        scaled = dy * (rest[0].float() + ctx.offset) if rest else dy
        dx = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        if config["residual"] and grads[1] is not None:
            dx = dx + grads[1].float()
        dx = dx.to(total.dtype)
        found: list[Any] = [dx, dx] if config["residual"] else [dx]
        if rest:
            found.append((dy * normed).reshape(-1, x.shape[-1]).sum(0).to(rest[0].dtype))
        return (*found, *[None] * (2 if config["offset"] else 1))

    return backward


def _examples(op: str) -> Sequence[tuple[Any, ...]]:
    made: list[tuple[Any, ...]] = []
    for dtype, rounding in (
        (torch.float32, SCALE_FIRST),
        (torch.bfloat16, SCALE_LAST),
        (torch.float16, SCALE_FIRST),
    ):
        x = torch.empty(4, 576, dtype=dtype, device="meta")
        weight = torch.empty(576, dtype=dtype, device="meta")
        made.append((x, *([x] if op == "add_rms_norm" else []), weight, 1e-6, 0.0, rounding))
    return made


def _family(op: str) -> KernelFamily:
    def configure(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
        return _configure(op, args, target)

    return KernelFamily(
        op=op,
        dtypes=DTYPES,
        legality=LEGALITY if op == "add_rms_norm" else tuple(c for c in LEGALITY if "residual" not in c),
        configure=configure,
        schema=cpp.schema,
        generate={"cpu": cpp.generate, "cuda": triton.generate, "hip": triton.generate},
        triton=TritonKernel(triton.parameters, triton.constants, triton.warps, triton.launcher),
        fake=_fake,
        save=_save,
        backward=_backward,
        rewrite_args=_rewrite_args,
        examples=lambda: _examples(op),
    )


RMS_NORM = _family("rms_norm")
ADD_RMS_NORM = _family("add_rms_norm")
