"""The terms of a pattern: what a plain function becomes when traced with a proxy for every parameter."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import fx

from tilewright.compiler.diagnostics import PassDefinitionError
from tilewright.compiler.schema import target_name


@dataclass(frozen=True)
class Var:
    """A parameter of the pattern: binds one value, the same everywhere."""

    name: str


@dataclass(frozen=True, eq=False)
class Call:
    """An operator call in a pattern; the same object twice must match the same node twice."""

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Number:
    """Binds a constant int or float and nothing else; see `constant_of`."""

    var: Var


@dataclass(frozen=True, eq=False)
class Either:
    """Alternative spellings of one value; the label of the one that matched is bound to `choice`."""

    choice: Var
    terms: tuple[tuple[str, Any], ...]


_TRACING: ContextVar[dict[str, fx.Proxy]] = ContextVar("tracing")
"""The parameters and free values of the pattern that is being traced."""


def free(name: str) -> Any:
    """In a pattern: a value bound to `name` that is not a parameter.

    Constants among these reach `replacement` as the dict `chosen`; a tensor has to be a parameter.
    """
    known = _TRACING.get()
    if name not in known:
        tracer = next(iter(known.values())).tracer
        known[name] = fx.Proxy(tracer.graph.placeholder(name), tracer)
    return known[name]


def either(choice: Any, **terms: Any) -> Any:
    """In a pattern: any one of the named terms, tried in order. `choice`, a parameter or a name, binds
    which."""
    proxy = free(choice) if isinstance(choice, str) else choice
    return proxy.tracer.create_proxy("call_function", either, (proxy,), terms)


def number(value: Any) -> Any:
    """In a pattern: the parameter or the name `value`, bound to a constant int or float only."""
    proxy = free(value) if isinstance(value, str) else value
    return proxy.tracer.create_proxy("call_function", number, (proxy,), {})


@dataclass(frozen=True)
class Form:
    """One alternative spelling of a pattern."""

    tag: str
    outputs: tuple[Call, ...]
    chosen: tuple[tuple[str, str], ...] = ()
    """Choices already made: an output that is an `either` gives one form for each of its terms."""


def trace_forms(fn: Callable[..., Any], params: tuple[str, ...]) -> Iterator[Form]:
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = [fx.Proxy(graph.placeholder(name), tracer) for name in params]
    token = _TRACING.set(dict(zip(params, proxies, strict=True)))
    try:
        out = fn(*proxies)
        alternatives = list(out) if isinstance(out, types.GeneratorType) else [("", out)]
    except fx.proxy.TraceError as error:
        raise PassDefinitionError(
            f"{fn.__qualname__} branches on a value: {error}",
            remedy="a pattern may branch on options, never on its inputs; yield several forms instead",
        ) from error
    finally:
        _TRACING.reset(token)
    done: dict[fx.Node, Any] = {}
    for tag, result in alternatives:
        outputs = result if isinstance(result, tuple) else (result,)
        terms = tuple(_term(o.node if isinstance(o, fx.Proxy) else o, done) for o in outputs)
        yield from _forms(fn.__qualname__, str(tag), terms)


def _forms(
    owner: str, tag: str, terms: tuple[Any, ...], chosen: tuple[tuple[str, str], ...] = ()
) -> Iterator[Form]:
    for i, term in enumerate(terms):
        if isinstance(term, Either):
            for label, alternative in term.terms:
                one = (*terms[:i], alternative, *terms[i + 1 :])
                yield from _forms(owner, tag, one, (*chosen, (term.choice.name, label)))
            return
        if not isinstance(term, Call):
            raise PassDefinitionError(f"{owner}: form {tag!r} must return a call, not {type(term).__name__}")
    if len(dict(chosen)) == len(set(chosen)):
        yield Form(tag, terms, chosen)


def _term(value: Any, done: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Proxy):
        value = value.node
    if isinstance(value, (list, tuple)):
        return type(value)(_term(v, done) for v in value)
    if not isinstance(value, fx.Node):
        return value
    if value not in done:
        if value.op == "placeholder":
            done[value] = Var(str(value.target))
        elif value.target is number:
            done[value] = Number(_term(value.args[0], done))
        elif value.target is either:
            terms = tuple((label, _term(t, done)) for label, t in value.kwargs.items())
            done[value] = Either(_term(value.args[0], done), terms)
        else:
            args = tuple(_term(a, done) for a in value.args)
            kwargs = tuple((k, _term(v, done)) for k, v in sorted(value.kwargs.items()))
            done[value] = Call(target_name(value.target), args, kwargs)
    return done[value]
