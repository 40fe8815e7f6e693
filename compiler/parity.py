"""Numeric agreement: bounds that cannot be met by accident, and float64 runs as the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tilewright.compiler.diagnostics import ParityError


class _Float64(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch declares the base untyped
    """Every float tensor that an op reads or makes is float64, whatever dtype the code asks for."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        written = {
            id(argument)
            for argument, spec in zip(args, func._schema.arguments, strict=False)
            if spec.alias_info is not None and spec.alias_info.is_write
        }

        def widen(leaf: Any) -> Any:
            if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
                return torch.float64
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64:
                if id(leaf) in written:
                    raise ParityError(
                        f"{func} writes a {leaf.dtype} tensor in place, which a float64 run cannot follow",
                        remedy="pass float64 buffers or functionalise the graph",
                    )
                return leaf.double()
            return leaf

        args, kwargs = tree_map(widen, (args, kwargs or {}))
        if func is torch.ops.aten._softmax.default or func is torch.ops.aten._log_softmax.default:
            args = (*args[:2], False)  # half_to_float is only legal on 16-bit input
        return func(*args, **kwargs)


def float64_evaluation(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """function(*args) with all float arithmetic in float64, even behind casts. No gradients."""

    def widen(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    with torch.no_grad(), _Float64():  # type: ignore[no-untyped-call]
        return function(*tree_map(widen, list(args)))


def relative_rms(got: Any, want: Any) -> float:
    """RMS(got - want) / RMS(want) in float64; infinite for other shapes or non-finite elements."""
    if not isinstance(got, Tensor) or not isinstance(want, Tensor):
        return 0.0 if type(got) is type(want) and got == want else math.inf
    if got.shape != want.shape:
        return math.inf
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else math.inf
    ours, theirs = got.detach().double(), want.detach().double()
    odd = ~torch.isfinite(theirs)
    if bool((odd != ~torch.isfinite(ours)).any()) or not torch.equal(
        torch.nan_to_num(ours[odd]), torch.nan_to_num(theirs[odd])
    ):
        return math.inf
    difference, size = (ours - theirs)[~odd], theirs[~odd]
    if difference.numel() == 0 or not bool(difference.any()):
        return 0.0
    scale = float(size.square().mean().sqrt())
    return float(difference.square().mean().sqrt()) / scale if scale > 0.0 else math.inf


@dataclass(frozen=True)
class Errors:
    """How far a result is from the truth."""

    rms: float
    """RMS(difference) / RMS(truth)."""
    ulps: float
    """Largest error in units in the last place of the result dtype at max(|truth|, RMS(truth))."""

    def within(self, *, ulps: float, rms: float) -> bool:
        return self.rms <= rms and self.ulps <= ulps


def errors(got: Tensor, truth: Tensor) -> Errors:
    """Errors of `got` in its own dtype against a truth of the same shape, of any float dtype."""
    rms = relative_rms(got, truth)
    if math.isinf(rms):
        return Errors(rms, rms)
    finite = torch.isfinite(truth)
    theirs = truth.detach().double()[finite]
    if theirs.numel() == 0:
        return Errors(0.0, 0.0)
    difference = (got.detach().double()[finite] - theirs).abs()
    magnitude = (
        theirs.abs().clamp_min(float(theirs.square().mean().sqrt())).clamp_min(torch.finfo(got.dtype).tiny)
    )
    exponent = torch.frexp(magnitude).exponent - 1
    ulp = torch.ldexp(torch.full_like(magnitude, torch.finfo(got.dtype).eps), exponent)
    return Errors(rms, float((difference / ulp).max()))


def assert_parity(
    got: Tensor,
    want: Tensor,
    *,
    ulps: float,
    rms: float,
    reference64: Tensor | None = None,
    nulls: Sequence[Tensor] = (),
) -> Errors:
    """Require that `got` agrees with `want` within both bounds and return the errors found.

    ulps bounds the largest error in units in the last place of got.dtype, rms the relative RMS. With
    `reference64`, the float64 result of the same inputs, errors are taken against it and may also not exceed
    4 times those of `want` plus 8 ulp. Integer and boolean results must be equal.
    Raises ParityError where the results differ by more, and refuses to judge (also ParityError) where the
    bounds would accept a wrong result: zeros, the mean over the last axis but one, the truth rolled by one
    along either of the last two axes, or any of `nulls` (the mean of V, the output of a known mutant).
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        raise ParityError(f"result is {_kind(got)} and should be {_kind(want)}")
    if not got.is_floating_point():
        if not torch.equal(got, want):
            raise ParityError(
                f"{int((got != want).sum())} of {got.numel()} elements differ from the exact result"
            )
        return Errors(0.0, 0.0)
    truth = want if reference64 is None else reference64
    for name, null in _wrong_results(truth, nulls):
        if errors(null.to(got.dtype), truth).within(ulps=ulps, rms=rms):
            raise ParityError(
                f"the bounds ulps={ulps:g}, rms={rms:g} accept {name} as a result, shape {tuple(want.shape)}",
                remedy="tighten the bounds, or use zero-mean inputs of gain 2 that differ along every axis",
            )
    found = errors(got, truth)
    if not found.within(ulps=ulps, rms=rms):
        raise ParityError(
            f"relative RMS error {found.rms:.3g} (bound {rms:g}), {found.ulps:.3g} ulp (bound {ulps:g})"
        )
    if reference64 is not None:
        allowed = _allowed(errors(want, reference64).rms, want.dtype)
        if found.rms > allowed:
            raise ParityError(f"relative RMS error {found.rms:.3g} against float64 exceeds {allowed:.3g}")
    return found


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _allowed(eager: float, dtype: torch.dtype) -> float:
    return 4 * eager + 8 * torch.finfo(dtype).eps


def _wrong_results(truth: Tensor, nulls: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    axes = [axis for axis in (-1, -2) if truth.dim() >= -axis and truth.shape[axis] > 1]
    wrong = [("zeros", torch.zeros_like(truth))]
    wrong.extend((f"the truth rolled by one along axis {axis}", truth.roll(1, axis)) for axis in axes)
    if -2 in axes:
        wrong.append(("the mean over the last axis but one", truth.mean(-2, keepdim=True).expand_as(truth)))
    wrong.extend((f"nulls[{index}]", null.expand_as(truth)) for index, null in enumerate(nulls))
    return wrong


@dataclass(frozen=True)
class Against64:
    """Relative RMS errors against the float64 run of the original, one entry per float output."""

    eager: tuple[float, ...]
    optimized: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def acceptable(self) -> bool:
        """The rule for exact passes: error(optimized) <= 4 error(eager) + 8 ulp, for every output."""
        rows = zip(self.eager, self.optimized, self.dtypes, strict=True)
        return all(ours <= _allowed(theirs, dtype) for theirs, ours, dtype in rows)


def errors_against_fp64(
    model: Callable[..., Any], optimized: Callable[..., Any], args: Sequence[Any]
) -> Against64:
    """Errors of both functions on args, in their own dtypes, against the model run in float64.

    args are cloned for every run. Raises ParityError when shapes or integer outputs differ.
    """
    with torch.no_grad():
        ours, theirs = (tree_flatten(function(*_clones(args)))[0] for function in (optimized, model))
    truth = tree_flatten(float64_evaluation(model, _clones(args)))[0]
    if len(ours) != len(theirs):
        raise ParityError(f"the optimized function returns {len(ours)} outputs and the model {len(theirs)}")
    rows: list[tuple[float, float, torch.dtype]] = []
    for index, (got, want, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
        if isinstance(want, Tensor) and want.is_floating_point():
            if not isinstance(got, Tensor) or got.shape != want.shape:
                raise ParityError(
                    f"output {index} of the optimized function has another shape than the model's"
                )
            rows.append((relative_rms(want, exact), relative_rms(got, exact), want.dtype))
        elif relative_rms(got, want) != 0.0:
            raise ParityError(f"output {index} differs and is not a float tensor")
    return Against64(*zip(*rows, strict=True)) if rows else Against64((), (), ())


def differential_fp64(before: Callable[..., Any], after: Callable[..., Any], inputs: Sequence[Any]) -> float:
    """Largest relative RMS between the outputs of two graphs when both run in float64 on the same inputs.

    Infinite when the numbers or shapes of outputs, or the values of integer outputs, differ.
    """
    want, got = (tree_flatten(float64_evaluation(graph, _clones(inputs)))[0] for graph in (before, after))
    if len(want) != len(got):
        return math.inf
    return max((relative_rms(ours, theirs) for ours, theirs in zip(got, want, strict=True)), default=0.0)


def _clones(args: Sequence[Any]) -> list[Any]:
    return list(tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, list(args)))
