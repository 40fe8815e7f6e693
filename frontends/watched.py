"""A compiled model whose linear layers and other modules of torch.nn are looked at once a generation.

Dynamo compares every module with what it was, at every call: a millisecond of a step of SmolLM2, a third of
what the step itself takes with int4 weights. Modules of torch.nn change only when somebody changes them, so
that it is enough to look before calls that nothing comes between. Modules that a model brings itself may
change on their own (rotary tables grow with the position): their guards stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

_VALUES = (bool, int, float, complex, str, bytes, tuple, torch.dtype, torch.device)


class Watched:
    """`torch.compile(module, backend="tilewright")` for fixed shapes, behind `look`."""

    def __init__(self, module: nn.Module, options: Mapping[str, Any], limit: int) -> None:
        """options: of the backend. limit: programs that the model may have."""
        self._module, self._options, self._limit = module, options, limit
        self._seen: list[Any] | None = None
        self._step: Callable[..., Any] = module
        self.look()

    def look(self) -> None:
        """To be called when somebody may have changed the model: the next call compiles it anew if so."""
        now = _contents(self._module)
        if self._seen is None or not _same(now, self._seen):
            self._seen = now
            options = {
                **self._options,
                "guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe,
            }
            # Isolated: what was compiled for the model as it was would pass its guards still.
            limits: dict[str, Any] = {"recompile_limit": self._limit, "isolate_recompiles": True}
            compiled: Any = torch.compile(
                self._module, backend="tilewright", options=options, dynamic=False, **limits
            )
            self._step = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)


def _contents(module: nn.Module) -> list[Any]:
    """Names and values of all that modules of torch.nn hold, inside a module."""
    found: list[Any] = []
    for name, one in module.named_modules(remove_duplicate=False):
        if _of_torch(type(one)):
            found += [name, type(one)]
            for key, value in vars(one).items():
                found.append(key)
                _add(value, found)
    return found


def _of_torch(kind: type) -> bool:
    """Whether Dynamo takes modules of this class for torch's own."""
    known = kind.__module__.startswith(("torch.nn.modules", "torch.ao."))
    return known or bool(getattr(kind, "_dynamo_marked_static", False))


def _add(value: Any, found: list[Any]) -> None:
    if isinstance(value, torch.Tensor):
        found += [value, value.dtype, tuple(value.shape), value.stride(), value.device, value.requires_grad]
    elif isinstance(value, Mapping):
        found.append(len(value))
        for key, one in value.items():
            found.append(key)
            _add(one, found)
    else:
        found.append(value)


def _same(now: list[Any], seen: list[Any]) -> bool:
    return len(now) == len(seen) and all(
        a is b or (type(a) is type(b) and isinstance(a, _VALUES) and a == b)
        for a, b in zip(now, seen, strict=True)
    )
