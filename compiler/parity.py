"""Numeric agreement: bounds that cannot be met by accident, and float64 runs as the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tilewright.compiler.diagnostics import ParityError


class _Float64(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch declares the base untyped
    """Every float tensor that an op reads or makes is float64, whatever dtype the code asks for."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        written = {
            id(argument)
            for argument, spec in zip(args, func._schema.arguments, strict=False)
            if spec.alias_info is not None and spec.alias_info.is_write
        }

        def widen(leaf: Any) -> Any:
            if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
                return torch.float64
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64:
                if id(leaf) in written:
                    raise ParityError(
                        f"{func} writes a {leaf.dtype} tensor in place, which a float64 run cannot follow",
                        remedy="pass float64 buffers or functionalise the graph",
                    )
                return leaf.double()
            return leaf

        args, kwargs = tree_map(widen, (args, kwargs or {}))
        if func is torch.ops.aten._softmax.default or func is torch.ops.aten._log_softmax.default:
            args = (*args[:2], False)  # half_to_float is only legal on 16-bit input
        return func(*args, **kwargs)


def float64_evaluation(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """function(*args) with all float arithmetic in float64, even behind casts. No gradients."""

    def widen(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    with torch.no_grad(), _Float64():  # type: ignore[no-untyped-call]
        return function(*tree_map(widen, list(args)))


def relative_rms(got: Any, want: Any) -> float:
    """RMS(got - want) / RMS(want) in float64; infinite for other shapes or non-finite elements."""
    if not isinstance(got, Tensor) or not isinstance(want, Tensor):
        return 0.0 if type(got) is type(want) and got == want else math.inf
    if got.shape != want.shape:
        return math.inf
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else math.inf
    ours, theirs = got.detach().double(), want.detach().double()
    odd = ~torch.isfinite(theirs)
    if bool((odd != ~torch.isfinite(ours)).any()) or not torch.equal(
        torch.nan_to_num(ours[odd]), torch.nan_to_num(theirs[odd])
    ):
        return math.inf
    difference, size = (ours - theirs)[~odd], theirs[~odd]
    if difference.numel() == 0 or not bool(difference.any()):
        return 0.0
    scale = float(size.square().mean().sqrt())
    return float(difference.square().mean().sqrt()) / scale if scale > 0.0 else math.inf
