"""Pipeline text <-> options: `name{tile=6x8x8,weight=int4}` and dataclass fields, with located errors."""

from __future__ import annotations

import dataclasses
import re
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tilewright.compiler.diagnostics import OptionError, PipelineError, nearest, shown

_NAME = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
_SIZES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
MAX_TEXT = 100_000


def split_pipeline(text: str) -> list[tuple[str, dict[str, str]]]:
    """`a,b{x=1,y=2}` -> [("a", {}), ("b", {"x": "1", "y": "2"})]; PipelineError shows the offending place."""
    if len(text) > MAX_TEXT:
        raise PipelineError(f"pipeline text has {len(text)} characters, at most {MAX_TEXT} are allowed")
    items: list[tuple[str, dict[str, str]]] = []
    at = 0
    text = text.strip()
    while at < len(text):
        found = _NAME.match(text, at)
        if not found:
            raise PipelineError(
                f"expected a pass name at column {at + 1}, found {text[at : at + 12]!r}",
                remedy="write name{option=value,...},name",
            )
        at, options = found.end(), {}
        if at < len(text) and text[at] == "{":
            end = text.find("}", at)
            if end < 0:
                raise PipelineError(f"the '{{' at column {at + 1} is never closed")
            options, at = _split_options(found.group(), text[at + 1 : end]), end + 1
        items.append((found.group(), options))
        while at < len(text) and text[at].isspace():
            at += 1
        if at < len(text):
            if text[at] != ",":
                raise PipelineError(f"expected ',' at column {at + 1}, found {text[at : at + 12]!r}")
            at += 1
            while at < len(text) and text[at].isspace():
                at += 1
            if at == len(text):
                raise PipelineError("the pipeline ends with ','", remedy="remove the last comma")
    return items


def _split_options(name: str, body: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in body.split(","))):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals or not key or not value:
            raise PipelineError(f"{name}: expected option=value, found {shown(part)}")
        if key in options:
            raise PipelineError(f"{name}: option {shown(key)} is given twice")
        options[key] = value
    return options


def build(cls: type, name: str, texts: dict[str, Any]) -> Any:
    """Make a pass value from option texts (or ready values); OptionError names option, value and legal
    range."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in texts.items():
        if key not in fields:
            raise OptionError(f"{name} has no option {shown(key)}", remedy=nearest(key, fields))
        values[key] = parse_value(name, key, value, hints[key]) if isinstance(value, str) else value
    for key, f in fields.items():
        if (
            key not in values
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ):
            raise OptionError(f"{name}: option {key!r} is required", remedy=f"write {name}{{{key}=...}}")
    for key, value in values.items():
        check_type(name, key, value, hints[key])
    return cls(**values)


def parse_value(name: str, key: str, text: str, kind: Any) -> Any:
    """Text of one option -> value of its annotated type."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if text == "none" and type(None) in get_args(kind):
            return None
        return parse_value(name, key, text, next(a for a in get_args(kind) if a is not type(None)))
    try:
        if origin is Literal:
            return next(c for c in get_args(kind) if str(c) == text)
        if origin is tuple:
            element = get_args(kind)[0]
            return tuple(parse_value(name, key, part, element) for part in text.split("x"))
        if kind is bool:
            return {"true": True, "false": False}[text]
        if kind is int:
            for suffix, factor in _SIZES.items():
                if text.endswith(suffix):
                    return int(text[: -len(suffix)]) * factor
            return int(text)
        return float(text) if kind is float else text
    except (ValueError, KeyError, StopIteration):
        raise OptionError(f"{name}: option {key!r} = {shown(text)}: expected {describe(kind)}") from None


def check_type(name: str, key: str, value: Any, kind: Any) -> None:
    """OptionError unless the value is of the annotated type."""
    if not _fits(value, kind):
        raise OptionError(f"{name}: option {key!r} = {shown(value)}: expected {describe(kind)}")


def _fits(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, a) for a in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if origin is tuple:
        args = get_args(kind)
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_fits(v, args[0]) for v in value)
        return len(value) == len(args) and all(_fits(v, a) for v, a in zip(value, args, strict=True))
    if kind is float:
        return type(value) in (int, float) and value == value and abs(value) != float("inf")
    if kind is int:
        return type(value) is int
    return isinstance(value, kind) if isinstance(kind, type) else True


def describe(kind: Any) -> str:
    """The legal range of a type, for people."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else describe(a) for a in get_args(kind))
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in get_args(kind))
    if origin is tuple:
        args = get_args(kind)
        if len(args) == 2 and args[1] is Ellipsis:
            return f"{describe(args[0])}s joined by 'x'"
        return f"{len(args)} values joined by 'x', such as " + "x".join("6" for _ in args)
    return {
        int: "an integer (64MiB is allowed)",
        float: "a finite number",
        bool: "true or false",
        str: "a word",
    }.get(kind, str(kind))


def format_value(value: Any) -> str:
    """The text that parses back to the value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return "x".join(format_value(v) for v in value)
    return str(value)


def format_pass(name: str, value: Any) -> str:
    """Pipeline text of a pass value: only options that differ from their defaults."""
    shown = []
    for f in dataclasses.fields(value):
        current = getattr(value, f.name)
        if f.default is dataclasses.MISSING or current != f.default:
            shown.append(f"{f.name}={format_value(current)}")
    return f"{name}{{{','.join(shown)}}}" if shown else name
