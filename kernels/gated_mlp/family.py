"""gated_mlp as a kernel family: selection, shapes, gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.ops.mlp import ACTIVATIONS, activate
from tilewright.kernels.common.family import (
    KernelFamily,
    TritonKernel,
    check_target,
    config_of,
    dtype_name,
    make_key,
)
from tilewright.kernels.gated_mlp import cpp, triton
from tilewright.runtime.contracts import KernelKey, Refusal, Target

DTYPES = ("float32", "bfloat16", "float16")
LEGALITY = (
    "gate and up are float32, bfloat16 or float16 and have one shape and dtype",
    f"activation is one of {', '.join(ACTIVATIONS)}",
    "sizes may be symbolic",
    "inputs that are not contiguous are copied inside the op",
)


def _configure(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    gate, up, activation = args
    refused = check_target([gate, up], target)
    if refused is not None:
        return refused
    dtype = dtype_name(gate, DTYPES, "gate")
    if isinstance(dtype, Refusal):
        return dtype
    if up.dtype != gate.dtype or up.dim() != gate.dim() or list(up.shape) != list(gate.shape):
        return Refusal(f"up is {list(up.shape)} {up.dtype}, gate is {list(gate.shape)} {gate.dtype}")
    if activation not in ACTIVATIONS:
        return Refusal(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return make_key("gated_mlp", target, dtype, activation=activation)


def _fake(key: KernelKey) -> Callable[..., Any]:
    def fake(gate: Tensor, up: Tensor) -> Tensor:
        return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)

    return fake


def _save(key: KernelKey) -> Callable[..., None]:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    return save


def _slope(dy: Tensor, gate: Tensor, activation: str) -> Any:
    """dy * activation'(gate)."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, gate)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dy, gate)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(dy, gate, approximate="tanh")
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, gate, 0)
    return torch.ops.aten.sigmoid_backward(dy, torch.sigmoid(gate))


def _backward(key: KernelKey) -> Callable[..., Any]:
    activation = config_of(key)["activation"]

    def backward(ctx: Any, dy: Tensor) -> tuple[Any, Tensor]:
        gate, up = ctx.saved_tensors
        return _slope(dy * up, gate, activation), dy * activate(gate, activation)

    return backward


def _examples() -> Sequence[tuple[Any, ...]]:
    cases = itertools.product((torch.float32, torch.bfloat16), ("silu", "gelu_tanh"))
    return [(*[torch.empty(4, 1536, dtype=dtype, device="meta")] * 2, name) for dtype, name in cases]


GATED_MLP = KernelFamily(
    op="gated_mlp",
    dtypes=DTYPES,
    legality=LEGALITY,
    configure=_configure,
    schema=lambda key: cpp.SCHEMA,
    generate={"cpu": cpp.generate, "cuda": triton.generate, "hip": triton.generate},
    triton=TritonKernel(triton.parameters, triton.constants, triton.warps, triton.launcher),
    fake=_fake,
    save=_save,
    backward=_backward,
    rewrite_args=lambda key, args: tuple(args[:2]),
    examples=_examples,
)
