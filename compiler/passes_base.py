"""What every pass is: a frozen value whose fields are its options, with declared stage, exactness and
order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, dataclass_transform

import torch

from tilewright.compiler import registry
from tilewright.compiler.diagnostics import OptionError, PassDefinitionError
from tilewright.compiler.options import format_pass
from tilewright.compiler.stage import SLOTS, Exactness, Stage


class Tensor:
    """A random example input: `Tensor(2, 3, 960, 16, gain=2.0)`, zero-mean normal values times `gain`."""

    def __init__(
        self, *shape: int, gain: float = 2.0, dtype: torch.dtype = torch.float32, weight: bool = False
    ) -> None:
        self.shape = shape
        self.gain = gain
        self.dtype = dtype
        self.weight = weight
        """Presented to the program as a module-owned weight."""

    def make(self, generator: torch.Generator) -> torch.Tensor:
        """The tensor, drawn from `generator`: bools are True with probability 0.7, integers lie in 0..3."""
        if self.dtype == torch.bool:
            return torch.rand(self.shape, generator=generator) > 0.3
        if self.dtype.is_complex:
            return torch.randn(self.shape, generator=generator, dtype=self.dtype) * self.gain
        if not self.dtype.is_floating_point:
            return torch.randint(0, 4, self.shape, generator=generator, dtype=self.dtype)
        return (torch.randn(self.shape, generator=generator) * self.gain).to(self.dtype)


@dataclass(frozen=True)
class Example:
    """A small program on which a pass must apply `count` times, or must refuse with `refusal` in its
    reason."""

    model: Callable[..., Any]
    inputs: tuple[Any, ...]
    refusal: str | None = None
    count: int = 1
    training: bool = False
    """Gradients of the program are wanted."""
    raw: bool = False
    """Shown to the pass as traced, not brought into normal form first."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Facts of the program, as a user would give them."""


class Pass:
    """Base of `Rewrite` and `GraphPass`. Subclasses are made by the decorators, never by hand."""

    name: ClassVar[str]
    stage: ClassVar[Stage]
    exactness: ClassVar[Exactness]
    paper: ClassVar[str]
    after: ClassVar[tuple[str, ...]]
    slots: ClassVar[tuple[str, ...]]
    trains: ClassVar[bool]
    """True when the pass may run on a program whose gradients are wanted."""

    def __post_init__(self) -> None:
        self.validate()
        from tilewright.compiler.admission import admit

        admit(type(self))

    def validate(self) -> None:
        """Check options against each other; raise `self.option_error(option, problem)`."""

    def option_error(self, option: str, problem: str) -> OptionError:
        """An error naming this pass, the option, its value and the problem."""
        return OptionError(f"{self.name}: option {option!r} = {getattr(self, option)!r}: {problem}")

    def text(self) -> str:
        """Pipeline text of this value."""
        return format_pass(self.name, self)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], Example]]:
        """(options, example) pairs; every accepting and refusing path of the pass is hit by one."""
        raise PassDefinitionError(f"{cls.__name__} must define examples()")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def declare_pass(
    name: str,
    *,
    stage: Stage,
    exactness: Exactness,
    paper: str = "",
    after: tuple[str, ...] = (),
    owns: tuple[str, ...] = (),
    trains: bool = False,
    checks: Callable[[type], None] = lambda cls: None,
) -> Callable[[type], Any]:
    """The shared body of `rewrite_pass` and `graph_pass`."""

    def declare(cls: type) -> Any:
        label = cls.__name__
        if not cls.__doc__ or "rewrite:" not in cls.__doc__:
            raise PassDefinitionError(
                f"{label}: the docstring needs a 'rewrite:' section with before -> after"
            )
        if "examples" not in cls.__dict__:
            raise PassDefinitionError(f"{label} must define examples()")
        stem = cls.__module__.rsplit(".", 1)[-1]
        if cls.__module__.startswith(registry.ROOT_PACKAGE) and stem.replace("_", "-") != name:
            raise PassDefinitionError(
                f"{label}: pass {name!r} must live in {name.replace('-', '_')}.py, not {stem}.py"
            )
        unknown = [s for s in owns if s not in SLOTS]
        if unknown:
            raise PassDefinitionError(
                f"{label}: unknown slot {unknown[0]!r}", remedy=f"one of {sorted(SLOTS)}"
            )
        approximate = exactness is Exactness.APPROXIMATE
        for needed in ("reference", "exact_limit"):
            if approximate != (needed in cls.__dict__):
                verb = "must" if approximate else "must not"
                raise PassDefinitionError(f"{label} is {exactness.value} and {verb} define {needed}()")
        checks(cls)
        made: Any = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        for key, value in dict(
            name=name, stage=stage, exactness=exactness, paper=paper, after=after, slots=owns, trains=trains
        ).items():
            setattr(made, key, value)
        registry.register(name, made)
        return made

    return declare
