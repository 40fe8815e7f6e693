"""Weights of linear layers as 2 to 8-bit integers, activations as 8-bit ones where wanted.

paper: arXiv:2208.07339 (per-row int8), arXiv:2210.17323 (groups), HQQ (half-quadratic offsets). A weight
becomes w ~ s q + m with one scale (and offset) per row or group of columns, packed as the kernels read it.
The packed form is derived from the weight and made anew when the weight changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from torch import fx

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass, ops
from tilewright.compiler.calibration import Statistics
from tilewright.compiler.graph import insert_like
from tilewright.compiler.schema import arguments
from tilewright.compiler.weight_format import Mode
from tilewright.passes.quantize._linear_calibrated import settled
from tilewright.passes.quantize._linear_examples import examples
from tilewright.passes.quantize._linear_formats import chosen_format, option_problem
from tilewright.passes.quantize._linear_weights import (
    format_problem,
    is_head,
    pack_weight,
    use_rounded,
)


@graph_pass(
    "quantize-linear",
    stage=Stage.WEIGHTS,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2210.17323",
    owns=("linear.weight_format", "linear.activation_format"),
)
class QuantizeLinear(GraphPass):
    """Quantize the weights of linear layers, and their activations at run time.

    rewrite:
        linear(x, weight, bias)
     -> quantized_linear(x, pack(round(weight)), bias)
    """

    weight: Literal["int8", "int4", "int3", "int2", "fp8-e4m3", "fp8-e5m2", "nvfp4", "int16"] = "int8"
    """Integers or small floats; int16 stands for the exact limit, which changes nothing."""
    group: int = 0
    """Columns that share a scale: a multiple of 32, or 0 for one per row; nvfp4 has 16."""
    per_tensor: bool = False
    """fp8: one scale for the whole weight."""
    mode: Mode = "symmetric"
    """`float-zero` adds a float offset to each scale."""
    activation: Literal["none", "int8-token", "int8-group", "int4-token", "int8-static", "fp8-token"] = "none"
    """Activations with one scale per token, per token and group of columns, or one for all, calibrated; fp8
    ones (e4m3) with fp8 weights only."""
    rounding: Literal["rtn", "hqq", "gptq", "whole-zero"] = "rtn"
    """To the nearest code, with half-quadratic offsets (float-zero only), by GPTQ, or with offsets that are
    whole numbers of steps, fitted to the weight (float-zero, at most 4 bits): integer zero points."""
    calibration: str = ""
    """GPTQ, static: a file of statistics (GPTQ: with Hessians), taken behind the same weight passes."""
    dynamic_above: float = 0.0
    """Static: a scale per token in layers whose calibrated range is so many times that of a usual token: few
    tokens set it. 0: nowhere."""
    head: bool = False
    """Also the layer that makes the program's output, or whose weight is the embedding's."""

    def validate(self) -> None:
        problem = option_problem(self)
        if problem is not None:
            raise self.option_error(*problem)

    def apply(self, program: Program, log: PassLog) -> None:
        if self.weight == "int16":
            log.note("16 bits: every weight stays as it is")
            return
        problems: dict[fx.Node, str | None] = {}
        statistics = Statistics.load(Path(self.calibration)) if self.calibration else None
        if statistics is not None:
            statistics.check(program)
        for node in list(program.graph.nodes):
            if node.target in (ops.quantized_linear, ops.quantized_linear_multi):
                log.refused(node, f"it is quantized already: {arguments(node)['format']}")
            if node.op != "call_function" or node.target is not ops.linear:
                continue
            problem = self._problem(program, node, problems)
            if problem is not None:
                log.refused(node, problem)
            elif log.take(node):
                self._quantize(program, node, statistics, log)
        log.finish(("tilewright::linear",))

    def _problem(self, program: Program, node: fx.Node, known: dict[fx.Node, str | None]) -> str | None:
        weight = arguments(node)["weight"]
        if not program.is_constant(weight):
            return f"its weight {weight} is computed, not a weight"
        if not self.head and is_head(node):
            return "it makes the program's output: a head stays as it is, unless head=true"
        if weight not in known:  # a weight that several layers read is looked at once
            tensor = program.tensor_of(weight)
            known[weight] = format_problem(tensor, chosen_format(self, tensor))
        return None if known[weight] is None else f"its weight {weight.name} {known[weight]}"

    def _quantize(self, program: Program, node: fx.Node, statistics: Statistics | None, log: PassLog) -> None:
        given = arguments(node)
        form, calibrated = settled(self, program, node, statistics)
        name = f"{given['weight'].name} as {form.text}"
        pack = partial(pack_weight, form=form, rounding=self.rounding, **calibrated)
        packed = program.derive(name, [given["weight"]], pack)
        rows = program.tensor_of(given["weight"]).shape[0]
        args = (given["x"], packed, given["bias"], rows, form.text)
        new = insert_like(program.graph, node, ops.quantized_linear, args, node)
        new.meta["rewritten_by"] = (*node.meta.get("rewritten_by", ()), self.name)
        log.claim_slots([node], {new: new})
        log.applied(node, rule=form.text, inserted=[new], removed=[node])
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
        program.drop_unread()  # the weight as it was, before the next is made

    def reference(self, program: Program) -> None:
        """The same layers with dequantized weights, under activations quantized and back."""
        statistics = Statistics.load(Path(self.calibration)) if self.calibration else None
        for node in [n for n in program.graph.nodes if n.target is ops.linear]:
            if self._problem(program, node, {}) is None:
                form, calibrated = settled(self, program, node, statistics)
                use_rounded(program, node, form, self.rounding, **calibrated)

    def exact_limit(self) -> QuantizeLinear:
        return QuantizeLinear(weight="int16")

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        yield from examples()
