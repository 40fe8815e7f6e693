"""Runs an exported entry point beside the program and the model it was made from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tilewright.compiler.diagnostics import ParityError
from tilewright.compiler.parity import relative_rms
from tilewright.compiler.program import InputKind
from tilewright.frontends.export.captured import Captured

ROUNDING_LIMIT, INT8_LIMIT = 1e-4, 0.1
"""Relative RMS between the export and the program: same function in float32; activations cut to 8 bits,
where a sum rounded in another order falls on another step."""


def check_parity(
    captured: Captured, program: fx.GraphModule, run: Callable[[list[Tensor]], list[Tensor]]
) -> dict[str, Any]:
    """Run the example call, and one with other dynamic sizes, in PyTorch and through the export `run`.

    PyTorch comes first, so that `run` may open the export when it is called, after the model's weights that a
    file holds have left memory. program: the rewritten program before lowering. Result: worst relative RMS
    against that `program`, and against the original `model`, of the outputs and of the inputs that the entry
    point writes into; where activations are cut to few bits also how far the program moves (`rounding`) when
    each of its quantized layers is off by one rounding. ParityError when the first exceeds what the formats
    explain.
    """
    fresh = _Fresh(captured)
    places = [captured.entry.inputs.index(name) for name in captured.entry.written]

    def results(call: Callable[[list[Tensor]], Any], tensors: Sequence[Tensor]) -> list[Tensor]:
        given = fresh(tensors)
        return [*_tensors(call(given)), *[given[i] for i in places]]

    cuts = _cuts_activations(program)
    limit = INT8_LIMIT if cuts else ROUNDING_LIMIT
    found: dict[str, Any] = {"limit": limit}
    calls = {"example": captured.entry.tensors, "other sizes": captured.entry.resized()}
    wanted = {}
    with torch.no_grad():
        for name, tensors in calls.items():
            if tensors is not None:
                with captured.entry.weights_in_turn():
                    original = results(lambda given: captured.entry.module(*given), tensors)
                rewritten = results(lambda given: program(*captured.inputs_for(given)), tensors)
                wanted[name] = tensors, original, rewritten
                found[name] = {}
                if cuts:
                    nudged = results(lambda given: _Nudged(program).run(*captured.inputs_for(given)), tensors)
                    found[name]["rounding"] = _worst(nudged, rewritten)
    captured.entry.release()
    for name, (tensors, original, rewritten) in wanted.items():
        with torch.no_grad():
            got = results(run, tensors)
        found[name] |= {"program": _worst(got, rewritten), "model": _worst(got, original)}
        if not found[name]["program"] <= limit:
            raise ParityError(
                f"{captured.entry.name}: the export differs from the program by "
                f"{found[name]['program']:.1e}, limit {limit:.0e} ({name})"
            )
    return found


class _Nudged(fx.Interpreter):
    """A program whose quantized layers are off by one rounding, as sums in another order are."""

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self._noise = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, multiplied by 1 + epsilon of its dtype times standard normal numbers."""
        value = super().run_node(n)
        if not _is_quantized(n):
            return value
        nudged = [self._nudged(tensor) for tensor in _tensors(value)]
        return nudged[0] if isinstance(value, Tensor) else nudged

    def _nudged(self, tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=self._noise)
        return (tensor * (1 + torch.finfo(tensor.dtype).eps * noise)).to(tensor.dtype)


class _Fresh:
    """Every run starts from the same values: a call may write into its inputs, and into state that it holds,
    a cache of fixed size for one."""

    def __init__(self, captured: Captured) -> None:
        pairs = zip(captured.program.inputs, captured.program.example_inputs, strict=True)
        held = [v for s, v in pairs if s.mutated and s.kind is InputKind.WEIGHT and isinstance(v, Tensor)]
        self._state = [(value, value.clone()) for value in held]

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The state as it was, and copies of the inputs."""
        for value, kept in self._state:
            value.copy_(kept)
        return [tensor.clone() for tensor in tensors]


def _cuts_activations(program: fx.GraphModule) -> bool:
    """True when a quantized linear layer takes activations of 8 or 4 bits, whole numbers or small floats."""
    return any(
        re.search(r"\.(?:int8-(?:group|token|static)|int4-token|fp8-token)\.", str(n.args[-1]))
        for n in program.graph.nodes
        if _is_quantized(n)
    )


def _is_quantized(node: fx.Node) -> bool:
    return "quantized_linear" in str(node.target)


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in (values if isinstance(values, (list, tuple)) else (values,)) if isinstance(v, Tensor)]


def _worst(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The worst relative RMS over the outputs; infinite where their number or a shape differs."""
    if len(got) < len(want):
        return math.inf
    errors = [0.0]
    for g, w in zip(got, want, strict=False):
        if g.shape != w.shape:
            return math.inf
        errors.append(relative_rms(g, w) if w.is_floating_point() else float(not torch.equal(g, w)))
    return max(errors)
