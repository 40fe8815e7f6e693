"""Patterns: a plain function, traced once with a proxy for every parameter, matched against a graph.

Every constant in a pattern is either written out (and must be equal) or a parameter (and is bound). Arguments
are compared by schema name with defaults filled in, so positional, keyword and default spellings match alike.
Operands of commutative ops match in either order. A failed match says how far it got and what was in the way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tilewright.compiler.match import Failure, Match, known_equal
from tilewright.compiler.schema import GETITEM, arguments, op_name, schema_arguments, tensor_meta
from tilewright.compiler.terms import Call, Either, Form, Number, Var, trace_forms

COMMUTATIVE = frozenset(
    {"aten::add", "aten::mul", "aten::maximum", "aten::minimum", "aten::bitwise_and", "aten::logical_and"}
)
_DIM_ARGUMENTS = frozenset({"dim", "dim0", "dim1", "dims", "normalized_dim"})
_DIMS_OF_RESULT = frozenset({"aten::cat", "aten::stack", "aten::unsqueeze"})
"""Their dims count over the axes of the result."""


@dataclass
class _Search:
    """State of one match attempt: remembers the furthest failure."""

    form: str
    best: Failure | None = None

    def fail(self, depth: int, reason: str, node: Any) -> None:
        if self.best is None or depth > self.best.depth:
            self.best = Failure(reason, node if isinstance(node, fx.Node) else None, depth, self.form)


@dataclass
class _Env:
    values: dict[str, Any] = field(default_factory=dict)
    calls: dict[int, fx.Node] = field(default_factory=dict)

    def copy(self) -> _Env:
        return _Env(dict(self.values), dict(self.calls))


class Pattern:
    """A traced pattern function; see the module docstring."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.params = tuple(inspect.signature(fn).parameters)
        self.forms = tuple(trace_forms(fn, self.params))
        self.anchors = frozenset(f.outputs[0].op for f in self.forms)

    def match(self, root: fx.Node, *, inner_may_escape: bool = False) -> Match | Failure:
        """The first match with `root` as the first output, else the furthest failure over all forms."""
        return next(self.matches(root, inner_may_escape=inner_may_escape))

    def matches(self, root: fx.Node, *, inner_may_escape: bool = False) -> Iterator[Match | Failure]:
        """Every match with `root` as the first output, in the order of the forms; one Failure if there is
        none."""
        best: Failure | None = None
        found_any = False
        for form in self.forms:
            search = _Search(form.tag)
            for env in self._solve(form.outputs[0], root, _Env(dict(form.chosen)), search):
                found = self._finish(form, env, search, inner_may_escape)
                if found is not None:
                    found_any = True
                    yield found
            if search.best is not None and (best is None or search.best.depth > best.depth):
                best = search.best
        if not found_any:
            yield best if best is not None else Failure("no form matched", root, 0, "")

    def _finish(self, form: Form, env: _Env, search: _Search, inner_may_escape: bool) -> Match | None:
        missing = [o for o in form.outputs if id(o) not in env.calls]
        if missing:
            search.fail(len(env.calls), f"output {missing[0].op} is not part of the first output", None)
            return None
        outputs = tuple(env.calls[id(o)] for o in form.outputs)
        nodes = tuple(dict.fromkeys(env.calls.values()))
        if not inner_may_escape:
            inside = set(nodes)
            for node in nodes:
                outside = [u for u in node.users if u not in inside]
                if outside and node not in outputs:
                    reason = f"{node.name} is also used by {outside[0].name}, outside the match"
                    search.fail(len(env.calls), reason, node)
                    return None
        bound = {**dict.fromkeys(self.params), **env.values}
        return Match(outputs, nodes, bound, form.tag)

    def _solve(self, term: Any, value: Any, env: _Env, search: _Search, what: str = "") -> Iterator[_Env]:
        if isinstance(term, Var):
            yield from self._bind(term, value, env, search)
        elif isinstance(term, Call):
            yield from self._call(term, value, env, search)
        elif isinstance(term, Either):
            made = env.values.get(term.choice.name)
            for label, alternative in term.terms:
                if made in (None, label):
                    chosen = _Env({**env.values, term.choice.name: label}, env.calls)
                    yield from self._solve(alternative, value, chosen, search, what)
        elif isinstance(term, Number):
            constant, made_by = constant_of(value)
            if constant is None:
                search.fail(len(env.calls), f"{what} is {value}, expected a number", value)
            else:
                env = _Env(dict(env.values), {**env.calls, **{id(n): n for n in made_by}})
                yield from self._bind(term.var, constant, env, search)
        elif isinstance(term, (list, tuple)):
            if isinstance(value, (list, tuple)) and len(value) == len(term):
                yield from self._all([(what, t, v) for t, v in zip(term, value, strict=True)], env, search)
            else:
                search.fail(len(env.calls), f"{what} is {value}, expected {len(term)} values", value)
        elif _same_constant(term, value):
            yield env
        else:
            search.fail(len(env.calls), f"{what} is {value}, expected {term}", value)

    def _bind(self, var: Var, value: Any, env: _Env, search: _Search) -> Iterator[_Env]:
        if var.name in env.values:
            old = env.values[var.name]
            if old is value or _same_constant(old, value):
                yield env
            else:
                search.fail(len(env.calls), f"{var.name} binds both {old} and {value}", value)
            return
        env = env.copy()
        env.values[var.name] = value
        yield env

    def _call(self, call: Call, value: Any, env: _Env, search: _Search) -> Iterator[_Env]:
        depth = len(env.calls)
        if not isinstance(value, fx.Node):
            search.fail(depth, f"expected a call of {call.op}, found the constant {value!r}", value)
            return
        if id(call) in env.calls:
            again = _twins(env.calls[id(call)], value, set(env.calls.values()))
            if again is None:
                search.fail(depth, f"expected {env.calls[id(call)].name} again, found {value.name}", value)
            else:
                env = env.copy() if again else env
                env.calls.update((id(n), n) for n in again)
                yield env
            return
        if op_name(value) != call.op:
            search.fail(depth, f"expected {call.op}, found {op_name(value)}", value)
            return
        env = env.copy()
        env.calls[id(call)] = value
        for pairs in _argument_pairs(call, value):
            if isinstance(pairs, str):
                search.fail(depth + 1, pairs, value)
            else:
                yield from self._all(pairs, env, search)

    def _all(self, pairs: list[_Pair], env: _Env, search: _Search) -> Iterator[_Env]:
        if not pairs:
            yield env
            return
        (what, term, value), rest = pairs[0], pairs[1:]
        for found in self._solve(term, value, env, search, what):
            yield from self._all(rest, found, search)


def constant_of(value: Any) -> tuple[int | float | None, list[fx.Node]]:
    """The number a value stands for and the nodes that make it; (None, []) when it is no constant number.

    A number, `full([], n)`, `scalar_tensor(n)`, or a captured constant without dimensions.
    """
    if type(value) in (int, float):
        return value, []
    if not isinstance(value, fx.Node):
        return None, []
    name = op_name(value)
    if name in ("aten::lift_fresh_copy", "aten::detach", "aten::scalar_tensor"):
        number, made_by = constant_of(value.args[0])
        return number, [value, *made_by] if number is not None else []
    if name == "aten::full" and value.args[0] in ([], ()):
        number, made_by = constant_of(value.args[1])
        return number, [value, *made_by] if number is not None else []
    if name == "get_attr" and value.graph.owning_module is not None:
        held = value.graph.owning_module._buffers.get(str(value.target))
        if held is None:
            held = vars(value.graph.owning_module).get(str(value.target))
        if type(held) is not torch.Tensor or held.dim() or held.is_complex() or held.dtype is torch.bool:
            return None, []
        if "tw_derived" not in str(value.target):
            return held.item(), [value]
    return None, []


def _twins(first: Any, second: Any, matched: set[fx.Node]) -> list[fx.Node] | None:
    """The nodes that compute `second` when it is `first` computed again from the same values; None when it
    is not."""
    if first is second:
        return []
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return [] if _same_constant(first, second) else None
    if first not in matched or first.target is not second.target or not _is_repeatable(first):
        return None
    found = [second]
    a, b = list(arguments(first).values()), list(arguments(second).values())
    for one, other in zip(_flat(a), _flat(b), strict=False):
        again = _twins(one, other, matched)
        if again is None:
            return None
        found += again
    return found if len(list(_flat(a))) == len(list(_flat(b))) else None


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield len(value)
            yield from _flat(value)
        else:
            yield value


def _is_repeatable(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return op_name(node) == GETITEM
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


_Pair = tuple[str, Any, Any]
"""What an argument is called in messages, the pattern's term for it, and the node's value."""


def _argument_pairs(call: Call, node: fx.Node) -> Iterator[list[_Pair] | str]:
    """Pattern terms paired with the node's arguments by schema name, once per operand order."""
    short = call.op.rsplit(":", 1)[-1]
    if call.op == GETITEM or not isinstance(node.target, torch._ops.OpOverload):
        if len(call.args) != len(node.args):
            yield f"{short} has {len(node.args)} arguments, expected {len(call.args)}"
        else:
            yield [
                (f"{short} argument {i}", *p) for i, p in enumerate(zip(call.args, node.args, strict=True))
            ]
        return
    names = [a[0] for a in schema_arguments(node.target)]
    if len(call.args) > len(names):
        yield f"{call.op} takes {len(names)} arguments, the pattern gives {len(call.args)}"
        return
    want = {**dict(zip(names, call.args, strict=False)), **dict(call.kwargs)}
    have = arguments(node)
    rank = _rank(node, have)
    pairs: dict[str, _Pair] = {}
    for name, _, default in schema_arguments(node.target):
        term, value = want.pop(name, default), have[name]
        if name in _DIM_ARGUMENTS and rank is not None:
            term, value = _positive(term, rank), _positive(value, rank)
        pairs[name] = (f"{short} {name}", term, value)
    if want:
        yield f"{call.op} has no argument {sorted(want)[0]!r}"
        return
    yield list(pairs.values())
    if call.op in COMMUTATIVE and len(names) >= 2:
        (at, a, x), (bt, b, y) = pairs[names[0]], pairs[names[1]]
        yield [(at, a, y), (bt, b, x), *(pairs[n] for n in names[2:])]


def _rank(node: fx.Node, have: dict[str, Any]) -> int | None:
    """How many axes the dims of a call count over."""
    if op_name(node) in _DIMS_OF_RESULT:
        meta = tensor_meta(node)
        return None if meta is None else meta.dim()
    for value in have.values():
        meta = tensor_meta(value)
        if meta is not None:
            return meta.dim()
    return None


def _positive(dim: Any, rank: int) -> Any:
    if isinstance(dim, (list, tuple)):
        return [_positive(d, rank) for d in dim]
    return dim + rank if isinstance(dim, int) and not isinstance(dim, bool) and dim < 0 else dim


def _same_constant(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same_constant(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    if isinstance(a, (torch.SymInt, torch.SymFloat)) or isinstance(b, (torch.SymInt, torch.SymFloat)):
        return known_equal(a, b)
    return type(a) in (int, float) and type(b) in (int, float) and a == b or (type(a) is type(b) and a == b)
