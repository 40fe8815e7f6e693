"""Which format the options of quantize-linear ask for, and which of them do not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tilewright.compiler.float_format import FLOAT_NAMES, NVFP4_GROUP, AnyFormat, FloatFormat
from tilewright.compiler.weight_format import CHUNK, WeightFormat

if TYPE_CHECKING:
    from tilewright.passes.quantize.quantize_linear import QuantizeLinear

_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}


def option_problem(options: QuantizeLinear) -> tuple[str, str] | None:
    """(option, what is expected of it) for the first option that does not fit the others, or None."""
    if options.dynamic_above != 0.0:
        if options.activation != "int8-static":
            return "dynamic_above", "it goes with activation=int8-static"
        if not 1.0 <= options.dynamic_above < float("inf"):
            return "dynamic_above", "expected 1 or more, or 0 for no layer"
    if options.weight in FLOAT_NAMES:
        return _float_problem(options)
    if options.group < 0 or options.group % CHUNK:
        return "group", f"expected a multiple of {CHUNK}, or 0 for one scale per row"
    if options.per_tensor:
        return "per_tensor", f"weight={options.weight} has a scale per row or group; fp8 may have one in all"
    if options.activation == "fp8-token":
        return "activation", f"fp8 activations go with fp8 weights, not with {options.weight}"
    if options.activation == "int8-group" and options.group == 0:
        return "activation", "the weight has no groups: give group, or take int8-token"
    if options.rounding == "hqq" and options.mode != "float-zero":
        return "rounding", "half-quadratic rounding needs mode=float-zero"
    if options.rounding == "whole-zero" and (options.mode != "float-zero" or _BITS[options.weight] > 4):
        return "rounding", "whole zero points need mode=float-zero and 4 bits or fewer"
    if (options.rounding == "gptq" or options.activation == "int8-static") != bool(options.calibration):
        return "calibration", "a calibration file goes with rounding=gptq or int8-static"
    return None


def _float_problem(options: QuantizeLinear) -> tuple[str, str] | None:
    name = options.weight
    if name == "nvfp4":
        if options.group not in (0, NVFP4_GROUP):
            return "group", f"nvfp4 has a scale per {NVFP4_GROUP} columns: expected {NVFP4_GROUP}, or 0"
        if options.per_tensor:
            return "per_tensor", "nvfp4 always has a scale for the whole weight beside those of its groups"
    elif options.group < 0 or options.group % CHUNK:
        return "group", f"expected a multiple of {CHUNK}, or 0 for one scale per row"
    elif options.per_tensor and options.group:
        return "per_tensor", f"one scale for the whole weight, or one per group of {options.group}: not both"
    known = ("none",) if name == "nvfp4" else ("none", "fp8-token")
    if options.activation not in known:
        return "activation", f"weight={name} goes with activation={' or '.join(known)}"
    if options.mode != "symmetric":
        return "mode", f"weight={name} has no offsets: expected symmetric"
    if options.rounding != "rtn":
        return "rounding", f"weight={name} is rounded to nearest: expected rtn"
    return ("calibration", f"weight={name} needs none") if options.calibration else None


def chosen_format(options: QuantizeLinear, weight: torch.Tensor) -> AnyFormat:
    """The format of a weight, packed for the device it is on."""
    if options.weight == "nvfp4":
        return FloatFormat("nvfp4", NVFP4_GROUP)
    if options.weight in FLOAT_NAMES:
        return FloatFormat(options.weight, options.group, options.per_tensor, options.activation)
    packing = "blocks8" if weight.device.type == "cpu" else "rows"
    bits = _BITS[options.weight]
    return WeightFormat(bits, options.group, options.mode, options.activation, packing)  # type: ignore[arg-type]
