"""Proofs by random evaluation: two functions are equal when they agree at random points of a large field."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from tilewright.compiler.finite_field import complex_pairs, composites, handlers, reductions  # noqa: F401  (they register the ops)
from tilewright.compiler.finite_field.planes import OutOfScope, Redraw, lift
from tilewright.compiler.finite_field.value import Value, variable
from tilewright.compiler.parity import float64_evaluation, relative_rms

Verdict = Literal["equal", "different", "out-of-scope"]
_ATTEMPTS = 8
_FLOAT64_AGREES = 1e-9
"""Relative RMS in float64 below which a disagreement in the field is put down to rounded constants."""


@dataclass(frozen=True)
class Constant:
    """An input whose numbers are part of the rule (a Hadamard matrix); other float tensors are variables."""

    tensor: Tensor


@dataclass(frozen=True)
class Proof:
    """What identity testing found.

    equal: the outputs agree in every draw. A false "equal" has probability below degree / 2^30 in each draw
    (Schwartz-Zippel) for quotients of polynomials of inputs, exponentials and arbitrary functions.
    different: they disagree, in the field or in shape, and in float64 too.
    out-of-scope: an op that residues cannot express, or float64 sees no difference although the field does
    (the rule uses a law of a function that is arbitrary here, or constants that differ by their rounding).
    Not covered by any verdict: rounding, dtypes, overflow, rows of attention with every key masked.
    """

    verdict: Verdict
    draws: int
    milliseconds: float
    detail: str = ""

    def __bool__(self) -> bool:
        return self.verdict == "equal"


def as_values(inputs: list[Any], seed: int) -> list[Any]:
    """Inputs over residues: float tensors become variables of their shape and dtype."""
    generator = torch.Generator().manual_seed(seed)

    def convert(leaf: object) -> object:
        if isinstance(leaf, Value) or not isinstance(leaf, Tensor | Constant):
            return leaf
        if isinstance(leaf, Constant):
            if leaf.tensor.is_floating_point():
                return Value(lift(leaf.tensor), leaf.tensor.dtype, str(seed))
            return leaf.tensor
        number = leaf.is_floating_point() or leaf.is_complex()
        return variable(leaf.shape, leaf.dtype, generator, str(seed)) if number else leaf

    return list(tree_map(convert, inputs, is_leaf=lambda leaf: isinstance(leaf, Constant)))


def evaluate(graph: Callable[..., Any], inputs: list[Any], seed: int = 0) -> Any:
    """Run a graph (or a plain function) over residues.

    inputs as for `prove_equal`, or Values. Returns its outputs with float tensors as Values. Raises
    `OutOfScope` for what residues cannot express and `Redraw` when this seed divides by zero.
    """
    with torch.no_grad():
        return graph(*as_values(inputs, seed))


def prove_equal(
    left: Callable[..., Any],
    right: Callable[..., Any],
    make_inputs: Callable[[int], list[Any]],
    draws: int = 5,
    seed: int = 0,
) -> Proof:
    """Decide whether two functions (or graph modules) of the same arguments are the same real function.

    make_inputs(draw) gives the arguments: float tensors (fake ones will do) stand for variables of their
    shape and dtype, `Constant` tensors, integer and boolean tensors and other objects are data. Sizes may
    vary by draw. The same seed gives the same verdict.
    Errors of the functions themselves are raised as they are.
    """
    start = time.perf_counter()

    def finish(verdict: Verdict, done: int, detail: str) -> Proof:
        return Proof(verdict, done, (time.perf_counter() - start) * 1e3, detail)

    for draw in range(draws):
        try:
            difference = _compare_once(left, right, make_inputs(draw), seed + draw)
        except OutOfScope as reason:
            difference = str(reason)
        if difference:
            apart = _float64_distance(left, right, make_inputs(draw), seed + draw)
            if apart > _FLOAT64_AGREES:
                return finish(
                    "different", draw + 1, f"{difference}; {apart:.2g} relative RMS apart in float64"
                )
            return finish(
                "out-of-scope", draw + 1, f"{difference}; {apart:.2g} relative RMS apart in float64"
            )
    return finish("equal", draws, "")


def _compare_once(left: Callable[..., Any], right: Callable[..., Any], inputs: list[Any], seed: int) -> str:
    """Empty if the functions agree at one random point, else the first difference."""
    for attempt in range(_ATTEMPTS):
        values = as_values(inputs, seed * _ATTEMPTS + attempt)
        try:
            with torch.no_grad():
                return _difference(left(*values), right(*values))
        except Redraw:
            continue
    raise OutOfScope(f"a division by zero in each of {_ATTEMPTS} draws")


def _difference(left: object, right: object) -> str:
    ours, theirs = tree_flatten(left)[0], tree_flatten(right)[0]
    if len(ours) != len(theirs):
        return f"{len(ours)} outputs against {len(theirs)}"
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            if isinstance(one, Tensor) or isinstance(other, Tensor) or one != other:
                return f"output {index}: {one!r} against {other!r}"
            continue
        if one.shape != other.shape:
            return f"output {index}: shape {tuple(one.shape)} against {tuple(other.shape)}"
        x, y = (side.planes if isinstance(side, Value) else lift(side) for side in (one, other))
        wrong = x.p != y.p
        for inf, sign in ((x.inf, y.inf), (y.inf, x.inf)):
            if inf is not None:
                wrong = wrong | (inf if sign is None else inf != sign)
        if bool(wrong.any()):
            return f"output {index}: {int(wrong.sum())} of {wrong.numel()} elements differ over the field"
    return ""


def _float64_distance(
    left: Callable[..., Any], right: Callable[..., Any], inputs: list[Any], seed: int
) -> float:
    """Largest relative RMS between the outputs on random float64 inputs; infinite where shapes differ.

    Both sides start from the same state of the random number generator: random ops draw the same.
    """
    generator = torch.Generator().manual_seed(seed)

    def convert(leaf: object) -> object:
        if isinstance(leaf, Constant):
            return leaf.tensor
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return torch.randn(leaf.shape, dtype=torch.float64, generator=generator)
        if isinstance(leaf, Tensor) and leaf.is_complex():
            return torch.randn(leaf.shape, dtype=torch.complex128, generator=generator)
        return leaf

    real = list(tree_map(convert, inputs, is_leaf=lambda leaf: isinstance(leaf, Constant)))
    outputs = []
    for function in (left, right):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            outputs.append(tree_flatten(float64_evaluation(function, real))[0])
    if len(outputs[0]) != len(outputs[1]):
        return float("inf")
    return max((relative_rms(one, other) for one, other in zip(*outputs, strict=True)), default=0.0)
