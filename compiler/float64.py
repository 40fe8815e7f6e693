"""Running a program in float64: the truth that eager and rewritten runs are both measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from tilewright.compiler.program import Program

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


def widen(value: Any) -> Any:
    """Floating tensors and dtype arguments to float64, everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in _NARROW else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _NARROW else value
    return value


def concrete(inputs: Sequence[Any]) -> list[Any]:
    """Inputs with every symbolic size replaced by the number it had at capture, which adds no guard."""
    return [v.node.hint if isinstance(v, torch.SymInt) else v for v in inputs]


class Float64(fx.Interpreter):
    """Interprets a program with every floating value in float64; derived buffers are derived anew."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module, garbage_collect_values=True)
        self._program = program
        self._inputs: dict[str, Any] = {}

    def run_on(self, inputs: list[Any]) -> Any:
        """Outputs for inputs in placeholder order; inputs are cloned, so state is not written back."""
        wide = [widen(v).clone() if isinstance(v, torch.Tensor) else v for v in concrete(inputs)]
        self._inputs = {s.name: v for s, v in zip(self._program.inputs, wide, strict=True)}
        with torch.no_grad():
            return self.run(*wide)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        for derived in self._program.derived:
            if derived.name == target:
                return derived.compute(*[self._inputs[s] for s in derived.sources])
        return widen(super().get_attr(target, args, kwargs))

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map(widen, (args, kwargs))
        if target is torch.ops.aten.rms_norm.default and (len(args) < 4 or args[3] is None):
            # Without eps it takes that of the dtype it computes in, which is part of the program's meaning.
            narrow = self._node.args[0].meta["val"].dtype  # type: ignore[union-attr]
            eps = torch.finfo(torch.promote_types(narrow, torch.float32)).eps
            args, kwargs = (*args[:3], *[None] * (3 - len(args)), eps), {}
        return super().call_function(target, args, kwargs)
