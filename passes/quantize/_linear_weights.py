"""What quantize-linear does to one weight, and which layers it leaves alone."""

from __future__ import annotations

from functools import partial

import torch
from torch import fx

from tilewright.compiler import Program, ops
from tilewright.compiler.float_format import AnyFormat, FloatFormat, rounded_activation
from tilewright.compiler.gptq import gptq
from tilewright.compiler.quantizers import (
    Quantized,
    fake_static,
    half_quadratic,
    weight_problem,
    whole_zero,
)
from tilewright.compiler.schema import arguments
from tilewright.compiler.weight_format import BLOCK_ROWS, WeightFormat

_PIECE = 1 << 20
"""Elements that are rounded at once: a row has its own grid, and temporaries stay small."""
_LOOK_THROUGH = frozenset(
    {
        "view",
        "reshape",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "to",
        "_to_copy",
        "alias",
        "clone",
        "transpose",
    }
)
"""Ops between an output head and the program's output."""


def is_head(node: fx.Node) -> bool:
    """True when the weight is the embedding's too, or the result reaches the output without arithmetic."""
    weight = arguments(node)["weight"]
    if any(user.target is ops.embedding for user in weight.users):
        return True
    pending, seen = [node], set[fx.Node]()
    while pending:
        for user in pending.pop().users:
            if user.op == "output":
                return True
            name = str(user.target).split(".")[1] if isinstance(user.target, torch._ops.OpOverload) else ""
            if name in _LOOK_THROUGH and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def format_problem(weight: torch.Tensor, form: AnyFormat) -> str | None:
    """Why a weight cannot have a format, or None."""
    problem = weight_problem(weight) or form.problem(weight.shape[1])
    if problem is None and isinstance(form, WeightFormat) and form.scale_dtype is torch.float16:
        largest = float(torch.stack(torch.aminmax(weight.detach())).abs().max())
        return f"reaches {largest:.3g}: float16 scales end at 65504" if largest > 65504 else None
    return problem


def round_weight(
    weight: torch.Tensor, form: WeightFormat, rounding: str, hessian: torch.Tensor | None = None
) -> Quantized:
    """Codes and grid of a weight [N, K] in a format."""
    quantizer = form.quantizer()
    if rounding == "gptq":
        assert hessian is not None, "the pass checks that gptq has a calibration"
        return gptq(quantizer, weight, hessian)
    if rounding == "whole-zero":
        return whole_zero(quantizer, weight)
    return half_quadratic(quantizer, weight) if rounding == "hqq" else quantizer.quantize(weight)


def pack_weight(
    weight: torch.Tensor,
    *,
    form: AnyFormat,
    rounding: str,
    hessian: torch.Tensor | None = None,
    step: float | None = None,
) -> torch.Tensor:
    """The packed uint8 matrix of a weight [N, K] of any floating dtype; step: of static activations."""
    if step is not None:
        assert isinstance(form, WeightFormat), "small floats have no static activations"
        return form.with_step(pack_weight(weight, form=form, rounding=rounding, hessian=hessian), step)
    if isinstance(form, FloatFormat):
        return form.pack_weight(weight)
    if rounding not in ("rtn", "whole-zero"):  # the others look at a matrix as a whole
        return form.pack(round_weight(weight.float(), form, rounding, hessian))
    rows = max(1, _PIECE // (BLOCK_ROWS * weight.shape[1])) * BLOCK_ROWS
    parts = [form.pack(round_weight(part.float(), form, rounding)) for part in weight.split(rows)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def use_rounded(
    program: Program,
    linear: fx.Node,
    form: AnyFormat,
    rounding: str,
    hessian: torch.Tensor | None = None,
    step: float | None = None,
) -> None:
    """Let a linear layer read its weight as rounded, and its input quantized and back: the obvious way."""
    given = arguments(linear)
    x, rounded = given["x"], partial(_dequantized, form=form, rounding=rounding, hessian=hessian)
    weight = program.derive("rounded", [given["weight"]], rounded)
    if form.activation != "none":
        with program.graph.inserting_before(linear):
            if step is not None:
                x = program.graph.call_function(fake_static, (x, step))
            else:
                x = program.graph.call_function(rounded_activation, (x, form.text))
    linear.args, linear.kwargs = (x, weight, given["bias"]), {}


def _dequantized(
    weight: torch.Tensor, *, form: AnyFormat, rounding: str, hessian: torch.Tensor | None
) -> torch.Tensor:
    if isinstance(form, FloatFormat):
        return form.round_weight(weight)
    return round_weight(weight.float(), form, rounding, hessian).dequantize()
