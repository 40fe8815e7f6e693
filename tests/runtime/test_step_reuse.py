"""Which steps the policies compute, what a lane remembers, and that requests never see each other."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tilewright.compiler.ops.measured_copy import measured_copy
from tilewright.runtime.contracts import REUSE, STATE
from tilewright.runtime.step_reuse import (
    FAST_30,
    SLOW_30,
    Accumulated,
    Codebook,
    FirstBlock,
    Policy,
    StepReuse,
    StepReuseError,
    _motion,
)
from tilewright.runtime.step_state import StepState

X = torch.ones(1, 4, 3)


def gate(entry: Tensor, probe: Tensor, residual: Tensor, number: int = 0) -> tuple[bool, Tensor]:
    """What a gated program does: (computed, result)."""
    access = REUSE.get()
    assert access is not None
    if access.decide(number, entry, probe, measured_copy.definition):
        return False, entry + access.residual(number)
    access.keep(number, entry + residual, entry, residual, measured_copy.definition)
    return True, entry + residual


def trace(
    policy: Policy, steps: int, residual: Callable[[int], Tensor], probe: Callable[[int], Tensor]
) -> list[int]:
    """The steps that are computed, from 1."""
    reuse = StepReuse(policy)
    reuse.begin("r", steps)
    found = []
    for step in range(steps):
        with reuse.call("r", "", step):
            if gate(0 * residual(step), probe(step), residual(step))[0]:
                found.append(step + 1)
    assert reuse.end("r") == (len(found), steps - len(found))
    return found


def test_codebook_traces_equal_the_published_schedule() -> None:
    same = trace(FAST_30, 30, lambda _: X, lambda _: X)
    assert same == [1, 2, 8, 14, 20, 26, 29, 30]
    assert trace(SLOW_30, 30, lambda _: X, lambda _: X) == [*range(1, 3), *range(5, 29, 3), 29, 30]
    wild = trace(FAST_30, 30, lambda s: X * (-1.0) ** s, lambda _: X)
    assert wild == list(range(1, 31))
    assert trace(Codebook(((math.inf, 1),)), 12, lambda _: X, lambda _: X) == list(range(1, 13))
    assert trace(FAST_30, 9, lambda _: 0 * X, lambda _: X) == list(range(1, 10)), "no size to compare with"


def test_the_change_is_divided_by_the_true_gap() -> None:
    book = Codebook(((0.1, 4), (math.inf, 1)))
    # From step 2 to step 6 the residual grows by 32 %: 8 % a step.
    values = {0: 1.0, 1: 1.0, 5: 1.32}
    assert trace(book, 20, lambda s: X * values.get(s, 1.32), lambda _: X)[:4] == [1, 2, 6, 10]
    values[5] = 1.48
    assert trace(book, 20, lambda s: X * values.get(s, 1.48), lambda _: X)[:4] == [1, 2, 6, 7]


def test_motion_makes_steps_dearer() -> None:
    torch.manual_seed(0)
    still = torch.ones(1, 6, 4)
    moving = torch.randn(1, 6, 4).sign()
    assert _motion(still, 3) == 0.0
    assert _motion(moving, 3) > 0.3
    book = Codebook(((0.08, 6), (math.inf, 2)), frames=3, norm=0.2)

    def drift(base: Tensor) -> list[int]:
        return trace(book, 30, lambda s: base * 1.05**s, lambda _: base)

    assert len(drift(moving)) > len(drift(still))
    with pytest.raises(StepReuseError, match="4 tokens are not 3 frames"):
        trace(book, 30, lambda _: X, lambda _: X)


def test_accumulated_and_first_block_traces() -> None:
    grow = lambda s: X * (1.0 + 0.1 * s)  # noqa: E731
    # Relative changes .1, .0909, .0833, .0769, ...: reuse while the sum stays below .2.
    assert trace(Accumulated(0.2), 8, grow, grow) == [1, 4, 7, 8]
    assert trace(Accumulated(0.2, (0.0, 0.0)), 8, grow, grow) == [1, 8]
    assert trace(Accumulated(0.0), 8, lambda _: X, lambda _: X) == list(range(1, 9))
    # Against the probe of the last computed step.
    assert trace(FirstBlock(0.25), 8, grow, grow) == [1, 4, 8]
    assert trace(FirstBlock(0.25, warmup=2, longest=1), 6, lambda _: X, lambda _: X) == [1, 2, 4, 6]
    assert trace(FirstBlock(0.0), 5, lambda _: X, lambda _: X) == list(range(1, 6))


def test_requests_and_branches_that_take_turns_never_see_each_other() -> None:
    def run(order: list[tuple[str, str]]) -> dict[tuple[str, str], list[Tensor]]:
        reuse, found = StepReuse(FAST_30), dict[tuple[str, str], list[Tensor]]()
        for name in ("a", "b"):
            reuse.begin(name, 12)
        place = dict.fromkeys(order, 0)
        for key in order:
            step = place[key]
            place[key] += 1
            level = 1.0 + (key[0] == "b") + 2.0 * (key[1] == "neg")
            with reuse.call(*key, step):
                found.setdefault(key, []).append(gate(X, X, X * level * 1.01**step)[1])
        assert reuse.bytes() == 4 * (1 + 3) * X.numel() * 4, "two residuals and two copies"
        return found

    keys = [(r, b) for r in "ab" for b in ("pos", "neg")]
    one = run([key for key in keys for _ in range(12)])
    two = run(keys * 12)
    for key in keys:
        assert all(torch.equal(x, y) for x, y in zip(one[key], two[key], strict=True))
    assert not torch.equal(one["a", "pos"][5], one["b", "pos"][5])


def test_a_call_that_raises_changes_nothing_and_shapes_may_change() -> None:
    reuse = StepReuse(FirstBlock(1.0))
    reuse.begin("r", 6)
    with reuse.call("r", "", 0):
        gate(X, X, X)

    def fails() -> None:
        with reuse.call("r", "", 1):
            gate(X, X * 9, X * 5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    with reuse.call("r", "", 1):
        assert not gate(X, X, X * 5)[0], "the probe of the failed call was kept"
    with reuse.call("r", "", 1):
        assert gate(X, X, X * 7)[0], "a second evaluation of a step is computed"
    with reuse.call("r", "", 2):
        assert torch.equal(gate(X, X, X)[1], 2 * X), "and nothing is kept of it"
    wide = torch.ones(2, 4, 3)
    with reuse.call("r", "", 3):
        assert gate(wide, wide, wide)[0]


def test_impossible_calls_are_errors() -> None:
    reuse = StepReuse(FAST_30)
    reuse.begin("r", 4)
    with pytest.raises(StepReuseError, match="runs already"):
        reuse.begin("r", 4)
    for step in (2, 3):
        with reuse.call("r", "", step):
            gate(X, X, X)
    for step, message in ((1, "step 1 of 4 after step 3"), (4, "step 4 of 4"), (-1, "step -1")):
        with pytest.raises(StepReuseError, match=message), reuse.call("r", "", step):
            pass
    inner = reuse.call("r", "other", 0)
    with reuse.call("r", "other", 0), pytest.raises(StepReuseError, match="in a call already"):
        inner.__enter__()
    reuse.end("r")
    with pytest.raises(StepReuseError, match="has not begun"), reuse.call("r", "", 0):
        pass
    for rates in ((), ((0.2, 1), (0.1, 1)), ((0.1, 0),), ((0.1, 1), (0.2, 2))):
        with pytest.raises(StepReuseError, match="codebook"):
            Codebook(rates)
    with pytest.raises(StepReuseError, match="threshold"):
        FirstBlock(-1.0)


def test_two_threads() -> None:
    reuse, results = StepReuse(FAST_30), dict[str, list[Tensor]]()

    def work(name: str, level: float) -> None:
        reuse.begin(name, 30)
        results[name] = []
        for step in range(30):
            with reuse.call(name, "", step):
                results[name].append(gate(X, X, X * level)[1])

    threads = [threading.Thread(target=work, args=(str(i), float(i))) for i in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(1, 4):
        assert all(torch.equal(x, X * (1 + i)) for x in results[str(i)])


def test_state_that_a_stretch_left_out_reads_does_not_age() -> None:
    """Run op by op, layers inside read their state at every step; only steps 0 and 5 are computed."""
    reuse, state = StepReuse(Accumulated(1e9)), StepState()
    reuse.begin("r", 6)
    state.begin("r", [float(5 - step) for step in range(6)])
    for step in range(6):
        with reuse.call("r", "", step), state.call("r", "", step):
            access, held = REUSE.get(), STATE.get()
            assert access is not None
            assert held is not None
            left_out = access.decide(0, X, X, measured_copy.definition)
            assert access.leaves_out() == left_out == (step not in (0, 5))
            if step == 0:
                held.put(0, {"rho": X})
            held.get(0, "rho")
            if left_out:
                access.residual(0)
            else:
                access.keep(0, 2 * X, X, X, measured_copy.definition)
            assert not access.leaves_out()
    assert state.age("r", "") == 0


def test_two_residuals_take_turns_and_a_failed_call_spoils_neither() -> None:
    """After any number of failures the residual that is added is that of the last step that went well."""
    reuse, at = StepReuse(FirstBlock(0.5)), list[int]()
    reuse.begin("r", 20)
    for step in range(4):  # probes far apart: all are computed
        with reuse.call("r", "", step):
            assert gate(X, X * 4.0**step, X * step)[0]
        held = reuse.running("r").branches[""].lanes[0].residual
        assert held is not None
        at.append(held.tensor.data_ptr())
    assert at[2:] == at[:2] != at[1:3]

    def fail() -> None:
        assert gate(X, X * 4.0**9, X * 77)[0]
        raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError), reuse.call("r", "", 4):
            fail()
    with reuse.call("r", "", 4):
        computed, result = gate(X, X * 4.0**3, X * 99)
    assert not computed
    assert torch.equal(result, 4 * X)
