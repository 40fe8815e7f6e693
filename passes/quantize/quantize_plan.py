"""Quantize each linear layer as a precision plan says: mixed precision from a shareable TOML file.

The plan names a format per weight; layers that it does not name stay as they are. Plans come from
`compiler.precision_plan`, which chooses under a budget, or from a text editor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import fx

from tilewright.compiler import (
    Exactness,
    Example,
    GraphPass,
    PassLog,
    Program,
    Stage,
    Tensor,
    graph_pass,
    ops,
)
from tilewright.compiler.calibration import fingerprint, weight_path
from tilewright.compiler.diagnostics import FactError
from tilewright.compiler.float_format import AnyFormat, parse_format, rounded_activation
from tilewright.compiler.graph import insert_like
from tilewright.compiler.precision_plan import FORMAT, KEEP, PrecisionPlan
from tilewright.compiler.quantizers import weight_problem
from tilewright.compiler.schema import arguments


@graph_pass(
    "quantize-plan",
    stage=Stage.WEIGHTS,
    exactness=Exactness.APPROXIMATE,
    after=("fold-norm-scale", "smooth-scales", "smooth-rotate", "rotate-hadamard"),
    owns=("linear.weight_format", "linear.activation_format"),
)
class QuantizePlan(GraphPass):
    """Give each linear layer the format that a plan chose for it.

    rewrite:
        linear(x, weight, bias)
     -> quantized_linear(x, pack(round(weight)), bias)   in the plan's format for this weight
    """

    plan: str
    """A TOML file, or the text of one."""

    def validate(self) -> None:
        if not self.plan:
            raise self.option_error("plan", "expected a TOML file")

    def read(self) -> PrecisionPlan:
        """The plan; LoadError when it is none."""
        return PrecisionPlan.parse(self.plan) if "\n" in self.plan else PrecisionPlan.load(Path(self.plan))

    def apply(self, program: Program, log: PassLog) -> None:
        plan = self.read()
        if plan.fingerprint and plan.fingerprint != fingerprint(program):
            raise FactError("the plan is of another model", remedy="make one for this model")
        for node in [n for n in program.graph.nodes if n.target is ops.linear]:
            form = self._format(program, node, plan)
            if isinstance(form, str):
                log.refused(node, form)
            elif log.take(node):
                self._quantize(program, node, form, log)
        log.finish(("tilewright::linear",))

    @staticmethod
    def _format(program: Program, node: fx.Node, plan: PrecisionPlan) -> AnyFormat | str:
        weight, path = arguments(node)["weight"], weight_path(program, node)
        if plan.layers.get(path, KEEP) == KEEP:
            return f"the plan leaves {path} as it is"
        if not program.is_constant(weight):
            return f"its weight {weight} is computed, not a weight"
        form, tensor = parse_format(plan.layers[path]), program.tensor_of(weight)
        problem = weight_problem(tensor) or form.problem(tensor.shape[1])
        return form if problem is None else f"its weight {path} {problem}"

    def _quantize(self, program: Program, node: fx.Node, form: AnyFormat, log: PassLog) -> None:
        given = arguments(node)
        name = f"{program.path_of(given['weight'])} as {form.text}"
        rows = program.tensor_of(given["weight"]).shape[0]
        packed = program.derive(name, [given["weight"]], partial(_packed, form=form))
        args = (given["x"], packed, given["bias"], rows, form.text)
        new = insert_like(program.graph, node, ops.quantized_linear, args, node)
        new.meta["rewritten_by"] = (*node.meta.get("rewritten_by", ()), self.name)
        log.claim_slots([node], {new: new})
        log.applied(node, rule=form.text, inserted=[new], removed=[node])
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
        program.drop_unread()  # the weight as it was, before the next is made

    def reference(self, program: Program) -> None:
        """The same layers with rounded weights, under activations quantized and back."""
        plan = self.read()
        for node in [n for n in program.graph.nodes if n.target is ops.linear]:
            form = self._format(program, node, plan)
            if isinstance(form, str):
                continue
            given = arguments(node)
            weight, x = program.derive("rounded", [given["weight"]], partial(_rounded, form=form)), given["x"]
            if form.activation != "none":
                with program.graph.inserting_before(node):
                    x = program.graph.call_function(rounded_activation, (x, form.text))
            node.args, node.kwargs = (x, weight, given["bias"]), {}

    def exact_limit(self) -> QuantizePlan:
        return replace(self, plan=PrecisionPlan().text())

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        formats = {
            "arg1_1": "int8.0.symmetric.none.blocks8",
            "arg2_1": "int4.32.float-zero.int8-token.blocks8",
            "arg3_1": KEEP,
        }
        plan = PrecisionPlan(layers=formats).text()
        inputs = (Tensor(3, 64), *(Tensor(n, 64, weight=True) for n in (16, 24, 8)))

        def three(x, a, b, c):
            return ops.linear(x, a), ops.linear(x, b), ops.linear(x, c)

        yield {"plan": plan}, Example(three, inputs, count=2)
        floats = {"arg1_1": "fp8-e4m3.0.fp8-token.rows", "arg2_1": "nvfp4.16.none.rows", "arg3_1": KEEP}
        yield {"plan": PrecisionPlan(layers=floats).text()}, Example(three, inputs, count=2)
        yield (
            {"plan": f'format = "{FORMAT}"\n[layers]\n'},
            Example(three, inputs, refusal="leaves arg1_1 as it is"),
        )


def _packed(weight: torch.Tensor, *, form: AnyFormat) -> torch.Tensor:
    return form.pack_weight(weight)


def _rounded(weight: torch.Tensor, *, form: AnyFormat) -> torch.Tensor:
    return form.round_weight(weight)
