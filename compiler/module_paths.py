"""Where a node came from: dotted module path and line in the user's model, in one form for every capture."""

from __future__ import annotations

import os
import re
from functools import lru_cache

import torch
from torch import fx

# A decorator that passes `*args` on names the module `args[0]` (transformers from 5.24 on).
_ROOT = re.compile(r"^[LG]\[['\"](?:args['\"]\]\[0|[^'\"]*['\"])\]")
_MODULES_ITEM = re.compile(r"\.(?:__dict__\[['\"]_modules['\"]\]|_modules)\[['\"](?P<name>[^'\"]*)['\"]\]")
_ITEM = re.compile(r"\[['\"]?(?P<name>[^'\"\]]*)['\"]?\]")
_VISIT = re.compile(r"@(?P<number>\d+)$")
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in ', re.MULTILINE)
_LIBRARY = re.compile(r"[\\/](?:site|dist)-packages[\\/]")
_TORCH = os.path.dirname(torch.__file__) + os.sep
_NO_MODULE = "_empty_nn_module_stack"


@lru_cache(maxsize=8192)
def normalise_path(expression: str) -> str:
    """A dotted module path from any spelling of it.

    `L['self']._modules['layers'].0`, `L['self'].__dict__['_modules']['layers'].0`, `L__self__layers`'s path
    `layers.0`, `L['args'][0].layers.0` and `layers[0]` all give `layers.0`; the root module gives the
    empty path.
    """
    text = _ROOT.sub("", expression.strip())
    text = _MODULES_ITEM.sub(lambda m: f".{m['name']}", text)
    text = _ITEM.sub(lambda m: f".{m['name']}", text)
    return text.strip(".")


def module_stack(node: fx.Node) -> list[tuple[str, int]]:
    """(dotted path, visit number) of each module the node was captured in, outermost first.

    The visit number is 0 the first time a module runs, then 1, 2, ...: looped modules differ in it only.
    """
    stack = node.meta.get("nn_module_stack") or {}
    entries = []
    for key, value in stack.items():
        path = value[0] if isinstance(value, (tuple, list)) else value
        if not isinstance(path, str) or path.startswith(_NO_MODULE):
            continue
        visit = _VISIT.search(str(key))
        entries.append((normalise_path(_VISIT.sub("", path)), int(visit["number"]) if visit else 0))
    return entries


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module of a node; empty in the root's own forward and where unknown."""
    entries = module_stack(node)
    return entries[-1][0] if entries else ""


def module_visit(node: fx.Node) -> int:
    """Which run of its innermost module the node belongs to, counted from 0."""
    entries = module_stack(node)
    return entries[-1][1] if entries else 0


def source_line(node: fx.Node) -> str:
    """`file:line` of the innermost frame in the user's own code; empty when the capture recorded no frame.

    Where every frame lies in an installed package, the innermost one outside torch (the model's line) is
    taken, and the innermost of all where there is none.
    """
    return _innermost(str(node.meta.get("stack_trace") or ""))


@lru_cache(maxsize=8192)
def _innermost(trace: str) -> str:
    frames = [(m["file"], m["line"]) for m in _FRAME.finditer(trace)]
    if not frames:
        return ""
    model = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    own = [frame for frame in model if not _LIBRARY.search(frame[0])]
    file, line = (own or model or frames)[-1]
    return f"{file}:{line}"
