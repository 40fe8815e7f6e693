"""Whole-graph passes, for work that is not a local pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, dataclass_transform

from tilewright.compiler.diagnostics import PassDefinitionError
from tilewright.compiler.log import PassLog
from tilewright.compiler.passes_base import Pass, declare_pass
from tilewright.compiler.program import Program
from tilewright.compiler.stage import Exactness, Stage


class GraphPass(Pass):
    """Subclass under `@graph_pass` and give `apply` and `examples`.

    `apply` edits `program.graph` in place, asks `log.take(node)` before each edit, and records each with
    `log.applied` or `log.refused`. An exception rolls the program back. An APPROXIMATE one also defines
    `reference(program)`, which edits a program into the obvious one that means the same, and `exact_limit()`.
    """

    def apply(self, program: Program, log: PassLog) -> None:
        """Edit the program and record what was done and what was refused."""
        raise PassDefinitionError(f"{type(self).__name__} must define apply()")


def _check_graph_pass(cls: type) -> None:
    if "apply" not in cls.__dict__:
        raise PassDefinitionError(f"{cls.__name__} must define apply()")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def graph_pass(
    name: str,
    *,
    stage: Stage,
    exactness: Exactness,
    paper: str = "",
    after: tuple[str, ...] = (),
    owns: tuple[str, ...] = (),
    trains: bool = False,
) -> Callable[[type], Any]:
    """Declare a `GraphPass` subclass as the pass `name`; errors in the definition surface at import."""
    return declare_pass(
        name,
        stage=stage,
        exactness=exactness,
        paper=paper,
        after=after,
        owns=owns,
        trains=trains,
        checks=_check_graph_pass,
    )
