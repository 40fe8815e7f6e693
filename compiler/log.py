"""What a pass says while it runs: applications, refusals, notes; fuel and slots are checked here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from tilewright.compiler.diagnostics import PipelineError
from tilewright.compiler.match import Match
from tilewright.compiler.module_paths import module_path, source_line
from tilewright.compiler.program import Program
from tilewright.compiler.report import Application, PassReport, Refused

Replay = Callable[[Program, Match, fx.GraphModule, list[fx.Node], Any], tuple[float | None, str]]


class Fuel:
    """How many rewrites may still happen; None means no limit. `spent` numbers applications over a
    pipeline."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.spent = 0
        self.last: tuple[fx.Node, Match | None] | None = None
        """What the last unit was spent on."""

    def take(self) -> bool:
        """True and one unit spent, or False when none is left."""
        if self.limit is not None and self.spent >= self.limit:
            return False
        self.spent += 1
        return True


class PassLog:
    """The record of one pass over one program."""

    def __init__(
        self,
        report: PassReport,
        fuel: Fuel,
        slots: tuple[str, ...],
        replay: Replay | None,
        before_first_edit: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = report.name
        self._report = report
        self._fuel = fuel
        self._slots = slots
        self._replay = replay
        self._starved = False
        self._before_first_edit = before_first_edit

    def take(self, node: fx.Node, m: Match | None = None) -> bool:
        """Ask for fuel before a rewrite, and for the slots the pass owns; PipelineError on a slot
        conflict."""
        for matched in m.nodes if m is not None else (node,):
            for slot in self._slots:
                owner = matched.meta.get("tw_slots", {}).get(slot)
                if owner is not None and owner != self.name:
                    raise PipelineError(
                        f"{self.name} and {owner} both want {slot} of {matched.name}",
                        remedy="keep one of them, or restrict them to different layers",
                    )
        if self._fuel.take():
            self._fuel.last = (node, m)
            self._before_first_edit()
            return True
        self._starved = True
        return False

    def claim_slots(self, matched: Iterable[fx.Node], new: dict[fx.Node, fx.Node]) -> None:
        """Record this pass as the owner of its slots on the nodes it inserted; older owners carry over."""
        owned: dict[str, str] = {}
        for node in matched:
            owned.update(node.meta.get("tw_slots", {}))
        owned.update({slot: self.name for slot in self._slots})
        if owned:
            for node in _made(new):
                node.meta["tw_slots"] = dict(owned)

    def replay(
        self, program: Program, m: Match, after: fx.GraphModule, inputs: list[fx.Node], key: Any
    ) -> tuple[float | None, str]:
        """Validate one application on random inputs; (error, note)."""
        if self._replay is None:
            return None, "replay is off"
        return self._replay(program, m, after, inputs, key)

    def applied(
        self,
        node: fx.Node,
        *,
        rule: str = "",
        inserted: Iterable[fx.Node] = (),
        removed: Iterable[fx.Node] = (),
        error: float | None = None,
        note: str = "",
    ) -> None:
        """Record one application rooted at `node`."""
        self._report.applied.append(
            Application(
                rule=rule,
                node=node.name,
                inserted=[n.name for n in (_made(inserted) if isinstance(inserted, dict) else inserted)],
                removed=[n.name for n in removed],
                source=source_line(node),
                module=module_path(node),
                replay_error=error,
                replay_note=note,
            )
        )

    def refused(
        self,
        node: fx.Node,
        reason: str,
        *,
        rule: str = "",
        blame: fx.Node | str | None = None,
        depth: int = 0,
    ) -> None:
        """Record that the pass looked at `node` and said no."""
        name = blame.name if isinstance(blame, fx.Node) else (blame or "")
        self._report.refused.append(
            Refused(rule, node.name, reason, name, depth, source_line(node), module_path(node))
        )

    def note(self, text: str) -> None:
        """One line about the pass as a whole."""
        self._report.notes.append(text)

    def finish(self, anchors: Iterable[str]) -> None:
        """Called once at the end: says when fuel ran out, and, of a pass that noted nothing, that nothing was
        even looked at."""
        if self._starved:
            self._report.skipped = f"out of fuel after {self._fuel.spent} rewrites"
        elif not (self._report.applied or self._report.refused or self._report.notes):
            self.note(f"no candidate: the program has no {' or '.join(sorted(anchors))} that starts to match")


def _made(copies: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """The calls among traced -> new nodes; a traced placeholder stands for an input that was there before."""
    return [new for traced, new in copies.items() if traced.op != "placeholder" and new.op == "call_function"]
