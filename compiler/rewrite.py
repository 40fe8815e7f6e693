"""Rewrites: pattern, where, replacement. The engine matches, asks, replays and replaces; it never guesses."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, dataclass_transform

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from tilewright.compiler.diagnostics import PassDefinitionError
from tilewright.compiler.log import PassLog
from tilewright.compiler.match import Failure, Match
from tilewright.compiler.passes_base import Pass, declare_pass
from tilewright.compiler.pattern import Pattern
from tilewright.compiler.program import Program
from tilewright.compiler.regions import fuses_a_cycle, inline, mutation_regions, sort_after
from tilewright.compiler.schema import op_name, tensor_meta
from tilewright.compiler.stage import Exactness, Stage
from tilewright.runtime.contracts import Refusal

MAX_CANDIDATES = 16
"""Matches of one node that are put before `where` until one is accepted."""


class _Accept:
    """The one verdict that lets a rewrite happen."""

    def __repr__(self) -> str:
        return "ACCEPT"


ACCEPT = _Accept()
Verdict = _Accept | Refusal


@dataclass(frozen=True)
class Change:
    """What one application costs after / before, as ratios of arithmetic, bytes moved and kernel launches."""

    flops: float = 1.0
    bytes: float = 1.0
    launches: float = 1.0


@dataclass(frozen=True)
class Traced:
    """A replacement as a flat graph of aten and tilewright calls over the bound nodes."""

    module: fx.GraphModule
    outputs: int


@dataclass
class _Run:
    """What one run of a rewrite over a program remembers."""

    regions: dict[fx.Node, int] | None
    traces: dict[Any, Traced] = field(default_factory=dict)
    erased: set[fx.Node] = field(default_factory=set)
    refusals: list[tuple[fx.Node, str, str, fx.Node | str | None, int]] = field(default_factory=list)
    """(node, reason, form, blame, depth); those of nodes that a later match took are not reported."""


class Rewrite(Pass):
    """A local rewrite. Subclass it under `@rewrite_pass` and give `pattern`, `replacement`, `examples`."""

    inner_may_escape: ClassVar[bool] = False
    """True when values inside the match may be used outside it (they are then computed twice)."""
    largest_first: ClassVar[bool] = False
    """True to visit users before what they use, so that a form that contains another form wins."""
    near_miss_depth: ClassVar[int] = 2
    """A failed match is reported as refused when at least this many pattern calls matched."""

    pattern: ClassVar[Callable[..., Any]]
    replacement: ClassVar[Callable[..., Any]]

    def where(self, m: Match) -> Verdict:
        """ACCEPT or refuse(...): pure, static, no device access, no timing."""
        return ACCEPT

    def cost(self, m: Match) -> Change:
        """Predicted effect of one application."""
        return Change()

    @classmethod
    @functools.cache
    def compiled_pattern(cls) -> Pattern:
        return Pattern(cls.pattern)

    def apply(self, program: Program, log: PassLog) -> None:
        """Rewrite every accepted match in `program.graph`, in topological order (reversed:
        `largest_first`)."""
        pattern = self.compiled_pattern()
        state = _Run(mutation_regions(program.graph))
        order = list(program.graph.nodes)
        for node in reversed(order) if self.largest_first else order:
            if node in state.erased or node.op != "call_function" or op_name(node) not in pattern.anchors:
                continue
            self._visit(node, program, log, state)
        for node, reason, form, blame, depth in state.refusals:
            if node not in state.erased:
                log.refused(node, reason, rule=form, blame=blame, depth=depth)
        log.finish(pattern.anchors)

    def _visit(self, node: fx.Node, program: Program, log: PassLog, state: _Run) -> None:
        """Apply the first match rooted at a node that is accepted; else report the first refusal or near
        miss."""
        refusal: tuple[Match, Refusal] | None = None
        found = self.compiled_pattern().matches(node, inner_may_escape=self.inner_may_escape)
        for m in itertools.islice(found, MAX_CANDIDATES):
            if isinstance(m, Failure):
                if m.depth >= self.near_miss_depth:
                    state.refusals.append((node, m.reason, m.form, m.node, m.depth))
                return
            m = replace(m, program=program)
            verdict = self._verdict(m, program, state.regions)
            if not isinstance(verdict, Refusal):
                if log.take(node, m):
                    self._replace(program, m, state.traces, log, state.erased)
                return
            refusal = refusal or (m, verdict)
        if refusal is not None:
            m, verdict = refusal
            state.refusals.append((node, verdict.reason, m.form, verdict.node, len(m.nodes)))

    def _verdict(self, m: Match, program: Program, regions: dict[fx.Node, int] | None) -> Verdict:
        if regions is not None and len({regions[n] for n in m.nodes}) > 1:
            return Refusal("a value is changed in place between the nodes of the match", m.root.name)
        cycle = fuses_a_cycle(m.nodes, m.outputs, m.bound.values())
        if cycle is not None:
            return Refusal(f"{cycle.name} needs an output of the match and feeds its input", cycle.name)
        verdict = self.where(m)
        if verdict is not ACCEPT and not isinstance(verdict, Refusal):
            raise PassDefinitionError(
                f"{self.name}.where returned {verdict!r}; it must return ACCEPT or refuse(...)"
            )
        return verdict

    def _replace(
        self, program: Program, m: Match, traces: dict[Any, Traced], log: PassLog, erased: set[fx.Node]
    ) -> None:
        params = [p for p in inspect.signature(self.replacement).parameters if p not in ("form", "chosen")]
        key = (m.form, tuple(signature_of(m.bound.get(p)) for p in params), repr(m.chosen(params)))
        if key not in traces:
            traces[key] = trace_replacement(self.replacement, params, m)
        traced = traces[key]
        inputs = [n for p in params for n in _nodes_in(m.bound.get(p))]
        error, note = log.replay(program, m, traced.module, inputs, key)
        new = inline(program, traced.module, inputs, before=m.root, like=m.root, origin=log.name)
        results = traced_outputs(traced.module)
        results = tuple(new[r] if isinstance(r, fx.Node) else r for r in results)
        for old, result in zip(m.outputs, results, strict=True):
            if isinstance(result, fx.Node) and "val" not in result.meta and "val" in old.meta:
                result.meta["val"] = old.meta["val"]
            old.replace_all_uses_with(result)
        sort_after(program.graph, [r for r in results if isinstance(r, fx.Node)])
        _erase_unused(program.graph, m.nodes, erased)
        for traced_node, made in list(new.items()):
            inserted = traced_node.op == "call_function" and made.target is operator.getitem
            if inserted and not made.users:  # one of several results that nobody wants
                program.graph.erase_node(made)
                del new[traced_node]
        log.claim_slots(m.nodes, new)
        log.applied(m.root, rule=m.form, inserted=new, removed=m.nodes, error=error, note=note)


def _erase_unused(graph: fx.Graph, nodes: tuple[fx.Node, ...], erased: set[fx.Node]) -> None:
    """Erase the nodes of a match that nobody uses any more, users before what they use."""
    left = list(nodes)
    while unused := [n for n in left if not n.users]:
        for node in unused:
            graph.erase_node(node)
            erased.add(node)
        left = [n for n in left if n not in erased]


def traced_outputs(module: fx.GraphModule) -> tuple[Any, ...]:
    """The values a traced replacement returns, as its own nodes."""
    out = next(n for n in reversed(module.graph.nodes) if n.op == "output").args[0]
    return tuple(out) if isinstance(out, (list, tuple)) else (out,)


def _nodes_in(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _nodes_in(v)


def signature_of(value: Any) -> Any:
    """Hashable description of bound values: equal signatures trace to the same graph."""
    if isinstance(value, fx.Node):
        meta = value.meta.get("val")
        if isinstance(meta, torch.Tensor):
            return (
                "tensor",
                tuple(map(str, meta.shape)),
                tuple(map(str, meta.stride())),
                meta.dtype,
                meta.device,
            )
        return ("value", str(meta))
    if isinstance(value, (list, tuple)):
        return tuple(signature_of(v) for v in value)
    return (type(value).__name__, repr(value))


def _fill(value: Any, fakes: Iterator[Any]) -> Any:
    if isinstance(value, fx.Node):
        return next(fakes)
    if isinstance(value, (list, tuple)):
        return type(value)(_fill(v, fakes) for v in value)
    return value


def trace_replacement(fn: Callable[..., Any], params: list[str], m: Match) -> Traced:
    """Trace a replacement on the fake tensors of a match into a flat graph of overloads."""
    extra = {"form": m.form, "chosen": m.chosen(params)}
    extra = {k: v for k, v in extra.items() if k in inspect.signature(fn).parameters}
    bound = [m.bound.get(p) for p in params]
    fakes = [n.meta["val"] for b in bound for n in _nodes_in(b)]

    def run(*values: Any) -> Any:
        feed = iter(values)
        filled = {p: _fill(b, feed) for p, b in zip(params, bound, strict=True)}
        out = fn(**filled, **extra)
        return tuple(out) if isinstance(out, (list, tuple)) else (out,)

    module = trace(run, fakes)
    return Traced(module, len(traced_outputs(module)))


def trace(run: Callable[..., Any], fakes: list[Any]) -> fx.GraphModule:
    """Pre-dispatch aten graph of `run` on fake tensors; constants made inside become buffers."""
    mode = next((f.fake_mode for f in fakes if hasattr(f, "fake_mode")), None)
    traceable = _fixed_arity(run, len(fakes)) if fakes else run
    with mode if mode is not None else torch.no_grad(), torch.no_grad():
        # make_fx tells inputs apart by identity, and nodes inlined from one trace share their fake tensor.
        inputs = [f.detach() if isinstance(f, torch.Tensor) else f for f in fakes]
        return make_fx(traceable, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(
            *inputs
        )


def _fixed_arity(run: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`run` with an explicit signature: make_fx names placeholders after parameters and counts defaults."""

    def call(*args: Any) -> Any:
        return run(*args)

    names = [inspect.Parameter(f"a{i}", inspect.Parameter.POSITIONAL_OR_KEYWORD) for i in range(count)]
    call.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    return call


def _check_rewrite(cls: type) -> None:
    for needed in ("pattern", "replacement"):
        if needed not in cls.__dict__:
            raise PassDefinitionError(f"{cls.__name__} must define {needed}()")
    want = list(inspect.signature(cls.pattern).parameters)  # type: ignore[attr-defined]
    got = [p for p in inspect.signature(cls.replacement).parameters if p not in ("self", "form", "chosen")]  # type: ignore[attr-defined]
    if want != got:
        raise PassDefinitionError(f"{cls.__name__}: pattern binds {want} but replacement takes {got}")
    if not isinstance(cls.__dict__["pattern"], staticmethod):
        raise PassDefinitionError(
            f"{cls.__name__}: pattern must be a staticmethod", remedy="add @staticmethod"
        )


@dataclass_transform(frozen_default=True, kw_only_default=True)
def rewrite_pass(
    name: str,
    *,
    stage: Stage,
    exactness: Exactness,
    paper: str = "",
    after: tuple[str, ...] = (),
    owns: tuple[str, ...] = (),
    trains: bool = False,
) -> Callable[[type], Any]:
    """Declare a `Rewrite` subclass as the pass `name`; errors in the definition surface at import."""
    return declare_pass(
        name,
        stage=stage,
        exactness=exactness,
        paper=paper,
        after=after,
        owns=owns,
        trains=trains,
        checks=_check_rewrite,
    )


def bound_tensor(value: Any) -> bool:
    """True for a node that carries a tensor."""
    return tensor_meta(value) is not None
