"""Programs as functions of their inputs, so that `prove_equal` can compare them before and after a pass."""

from __future__ import annotations

from typing import Any

from torch import fx

from tilewright.compiler.program import Program


class ProgramFunction(fx.Interpreter):
    """A program as a function of its placeholders; derived buffers are computed from its weights."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self._derived = {derived.name: derived for derived in program.derived}
        self._names = [spec.name for spec in program.inputs]
        self._inputs: dict[str, Any] = {}

    def __call__(self, *inputs: Any) -> Any:
        self._inputs = dict(zip(self._names, inputs, strict=True))
        return self.run(*inputs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        derived = self._derived.get(target)
        if derived is None:
            return super().get_attr(target, args, kwargs)
        return derived.compute(*(self._inputs[source] for source in derived.sources))
