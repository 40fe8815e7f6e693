"""What was done, what was not and why: plain data, the source of every view (terminal, HTML, JSON)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Application:
    """One place where a pass applied."""

    rule: str
    """Rule or form name inside the pass."""
    node: str
    """Root node of the match, by its name before the rewrite."""
    inserted: list[str] = field(default_factory=list)
    """Names of the nodes that replaced it."""
    removed: list[str] = field(default_factory=list)
    source: str = ""
    """`file:line` in the user's model."""
    module: str = ""
    """Dotted module path (`model.layers.3.mlp`)."""
    replay_error: float | None = None
    """Relative RMS difference of the replayed region; None when it was not replayed."""
    replay_note: str = ""
    """Why it was not replayed, empty when it was."""


@dataclass
class Refused:
    """One place where a pass looked and said no."""

    rule: str
    node: str
    reason: str
    """Completes `PASS did not apply at NODE: ...`."""
    blame: str = ""
    """The node the reason is about."""
    depth: int = 0
    """Pattern nodes that matched before the failure: the nearest miss has the largest."""
    source: str = ""
    module: str = ""


@dataclass
class PassReport:
    """One pass of the pipeline."""

    name: str
    text: str
    """The pass as pipeline text, options included."""
    stage: str
    exactness: str
    paper: str = ""
    applied: list[Application] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""
    """Why the whole pass was skipped (out of fuel, training), empty when it ran."""
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    graph_before: str = ""
    graph_after: str = ""


@dataclass
class NodeCost:
    """Cost of one node of the final program; sizes are formulas in the dynamic dimensions where there are
    any."""

    node: str
    op: str
    flops: str
    bytes_read: str
    bytes_written: str
    launches: int
    roofline_us: float | None = None
    where: str = ""
    """What runs it: a kernel name, `inductor`, `eager`."""
    source: str = ""
    module: str = ""
    flops_value: float | None = None
    """`flops` as a number at the captured sizes; None when a size has no value."""
    bytes_value: float | None = None
    """Bytes read and written at the captured sizes."""
    note: str = ""
    """What the figures leave out, empty when nothing."""
    inputs: list[str] = field(default_factory=list)
    """Names of the nodes it reads."""


@dataclass
class Totals:
    """Sums over a whole program."""

    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 0
    roofline_ms: float = 0.0
    unknown: int = 0
    """Nodes without a number, which the sums leave out."""


@dataclass
class Report:
    """One compilation."""

    model: str = ""
    pipeline: str = ""
    origin: str = ""
    """`dynamo` or `export`."""
    training: bool = False
    target: str = ""
    left_alone: str = ""
    """Why the graph was handed on unchanged, empty when it was captured."""
    device: str = ""
    """The device descriptor that roofline times are for."""
    sizes: dict[str, int] = field(default_factory=dict)
    """What each dynamic size was when the program was captured: numbers are taken there."""
    passes: list[PassReport] = field(default_factory=list)
    facts: list[dict[str, str]] = field(default_factory=list)
    """name, value, origin of each fact."""
    graph_breaks: list[dict[str, str]] = field(default_factory=list)
    """reason and user source line of each graph break."""
    kernels: list[dict[str, str]] = field(default_factory=list)
    """node, op, kernel (what runs it), why (there is no generated kernel), source (file) and text (generated
    source, where the file is gone) of each lowering decision."""
    costs_before: list[NodeCost] = field(default_factory=list)
    """Costs of the normal form, before the pipeline ran."""
    costs_after: list[NodeCost] = field(default_factory=list)
    totals_before: Totals = field(default_factory=Totals)
    totals_after: Totals = field(default_factory=Totals)
    chains: list[str] = field(default_factory=list)
    """Why stretches of a decode graph did not become one generated function each, one line per stretch."""
    pieces: list[int] = field(default_factory=list)
    """How often each compiled piece is called, where repeated blocks share one; empty when compiled whole."""
    errors: dict[str, float] = field(default_factory=dict)
    """Errors against a float64 run: `eager`, `tilewright`, by output."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds by phase: capture, passes, verify, lower, inductor."""
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent, sort_keys=True)

    def applied(self, name: str) -> int:
        """How many times the pass of that name applied."""
        return sum(len(p.applied) for p in self.passes if p.name == name)
