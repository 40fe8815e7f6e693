"""What a calibration says about one layer that quantize-linear takes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tilewright.compiler import Program
from tilewright.compiler.calibration import Statistics, weight_path
from tilewright.compiler.diagnostics import FactError
from tilewright.compiler.float_format import AnyFormat
from tilewright.compiler.quantizers import ACTIVATION_MAX, SMALLEST_SCALED
from tilewright.compiler.schema import arguments
from tilewright.compiler.weight_format import WeightFormat
from tilewright.passes.quantize._linear_formats import chosen_format

if TYPE_CHECKING:
    from tilewright.passes.quantize.quantize_linear import QuantizeLinear


def settled(
    options: QuantizeLinear, program: Program, linear: fx.Node, statistics: Statistics | None
) -> tuple[AnyFormat, dict[str, Any]]:
    """(format of a layer's weight, the hessian and step it is made with: None where not asked for)."""
    form = chosen_format(options, program.tensor_of(arguments(linear)["weight"]))
    form = _steady(form, options.dynamic_above, statistics, program, linear)
    static = form.activation == "int8-static"
    return form, {
        "hessian": _hessian_of(statistics, program, linear) if options.rounding == "gptq" else None,
        "step": _step_of(statistics, program, linear) if static else None,
    }


def _hessian_of(statistics: Statistics | None, program: Program, linear: fx.Node) -> torch.Tensor | None:
    """The second moments [K, K] of what a layer reads, None without statistics; FactError when they have
    none."""
    if statistics is None:
        return None
    found = statistics.layer(program, linear)
    if found.hessian is None:
        path = weight_path(program, linear)
        raise FactError(f"the calibration has no Hessian of {path}", remedy="calibrate with hessian=True")
    return found.hessian


def _step_of(statistics: Statistics | None, program: Program, linear: fx.Node) -> float:
    """The step of the 8-bit grid that what a layer read in its calibration spans."""
    assert statistics is not None, "the pass checks that static activations have a calibration"
    largest = float(statistics.layer(program, linear).absmax.max())
    return max(largest / ACTIVATION_MAX, SMALLEST_SCALED)


def _steady(
    form: AnyFormat,
    dynamic_above: float,
    statistics: Statistics | None,
    program: Program,
    linear: fx.Node,
) -> AnyFormat:
    """The format with a scale per token in place of the static one where the layer's calibrated range is more
    than `dynamic_above` times what a token needs; FactError when the calibration does not know that."""
    if dynamic_above == 0.0 or not isinstance(form, WeightFormat) or not form.has_step:
        return form
    assert statistics is not None, "the pass checks that static activations have a calibration"
    found = statistics.layer(program, linear)
    largest = float(found.absmax.max())
    if found.typical == 0.0 and largest > 0.0:
        path = weight_path(program, linear)
        raise FactError(
            f"the calibration does not say what a token of {path} needs", remedy="calibrate again"
        )
    return replace(form, activation="int8-token") if largest > dynamic_above * found.typical else form
