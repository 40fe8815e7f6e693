"""Where a node comes from: the line of the user's model and the module path, as capture recorded them."""

from __future__ import annotations

import os
import re
from functools import lru_cache

import torch
from torch import fx

_FRAME = re.compile(r'File "([^"\n]+)", line (\d+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_ROOT = re.compile(r"^L\[['\"]\w+['\"]\]")
_LOOKUP = re.compile(r"(?:\.?__dict__)?(?:\.?_(?:modules|parameters|buffers))?\[['\"]([^'\"]*)['\"]\]")
_CONTAINER = re.compile(r"\.(?:__dict__\[['\"])?_modules(?:['\"]\])?")


def user_source(node: fx.Node) -> str:
    """`file:line` of the innermost frame outside torch, empty when capture recorded none."""
    return _innermost(node.meta.get("stack_trace") or "")


@lru_cache(maxsize=4096)
def _innermost(trace: str) -> str:
    for file, line in reversed(_FRAME.findall(trace)):
        if not file.startswith((_TORCH, "torch" + os.sep, "<")):
            return f"{file}:{line}"
    return ""


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module, `model.layers.3.mlp`; empty for the root and where unknown.

    Dynamo writes `L['self'].model.layers.0` or `L['self'].__dict__['_modules']['blocks'].0`, export the plain
    path.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    last = list(stack.values())[-1]
    path = last[0] if isinstance(last, (tuple, list)) else last
    return plain_path(path) if isinstance(path, str) and not path.startswith("_empty_nn_module") else ""


@lru_cache(maxsize=4096)
def plain_path(path: str) -> str:
    """A module path without Dynamo's root variable and dictionary look-ups."""
    path = _CONTAINER.sub("", _ROOT.sub("", path))
    return _LOOKUP.sub(r".\1", path).strip(".")
