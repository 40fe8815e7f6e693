"""State between steps: phases of the published schedules, interleaved requests and branches, reset rules."""

from __future__ import annotations

import threading

import pytest
import torch

from tilewright.runtime.step_state import (
    PRESETS,
    Phase,
    Schedule,
    StepClock,
    StepState,
    StepStateError,
    prefix_steps,
)

LETTERS = {Phase.DENSE: "D", Phase.SEARCH: "Q", Phase.SPARSE: "S", Phase.REFRESH: "R"}
FIFTY = [1000.0 - 20 * i for i in range(50)]


def trace(schedule: Schedule, steps: int = 50) -> str:
    return "".join(LETTERS[schedule.phase(s)] for s in range(steps))


@pytest.mark.parametrize(
    ("name", "phases"),
    [
        ("sta", "D" * 12 + "S" * 38),
        ("svg1", "D" * 10 + "S" * 40),
        ("rettention", "D" * 15 + "RSSSS" * 7),
        ("adaspa", "D" * 10 + "Q" + "S" * 19 + "Q" + "S" * 19),
        ("sla", "S" * 50),
    ],
)
def test_published_phases(name: str, phases: str) -> None:
    assert trace(PRESETS[name](50)) == phases


def test_published_fractions_are_floored() -> None:
    assert [prefix_steps(f, n) for f, n in ((0.2, 50), (0.35, 40), (0.1, 50), (0.04, 50), (0.3, 35))] == [
        10,
        14,
        5,
        2,
        10,
    ]
    with pytest.raises(StepStateError, match="fraction = 1.5"):
        prefix_steps(1.5, 10)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"dense": -1}, "dense = -1"),
        ({"searches": (3,), "period": 2}, "either searches or refreshes"),
        ({"dense": 5, "searches": (3,)}, "ascending steps from 5"),
        ({"searches": (0, 0)}, "ascending"),
        ({"dense": 2, "searches": (4,)}, "steps 2 to 3 would attend"),
    ],
)
def test_illegal_schedules(how, said) -> None:
    with pytest.raises(StepStateError, match=said):
        Schedule(**how)


def test_clock_goes_by_value() -> None:
    clock = StepClock(FIFTY)
    assert [clock.step(t) for t in (1000.0, 1000.0, 980.0, 990.0, 20.0, 0.0)] == [0, 0, 1, 0, 49, 49]
    with pytest.raises(StepStateError, match="before the first"):
        clock.step(1200.0)
    with pytest.raises(StepStateError, match="none above the last"):
        StepClock([3.0, 4.0])
    with pytest.raises(StepStateError, match="at least one"):
        StepClock([])


def test_clock_tells_close_timesteps_apart() -> None:
    """Steps less than half a unit apart, as of a flow sampler's last ones or in units of 1."""
    times = [0.9, 0.6, 0.55, 0.1, 0.0]
    assert [StepClock(times).step(t) for t in times] == [0, 1, 2, 3, 4]
    assert StepClock([1000.0, 981.0, 960.0]).step(980.625) == 1, "rounded on the way"


def test_clock_counts_the_calls_of_one_timestep() -> None:
    clock = StepClock([30.0, 20.0, 20.0, 10.0, 10.0, 10.0])
    calls = [("c", 30.0, 0), ("u", 30.0, 0), ("c", 20.0, 1), ("u", 20.0, 1), ("c", 20.0, 2), ("u", 20.0, 2)]
    calls += [(b, 10.0, s) for s in (3, 4, 5) for b in ("c", "u")]
    for branch, time, step in calls:
        assert clock.step(time, branch) == step
    with pytest.raises(StepStateError, match="call 4 of branch 'c' at timestep 10.0: 3 steps have it"):
        clock.step(10.0, "c")


def test_clock_counts_where_nearly_equal_timesteps_are_rounded_to_one() -> None:
    clock = StepClock([999.0, 199.8004, 199.8])
    assert [clock.step(t) for t in (999.0, 199.5, 199.5)] == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clock_knows_thousandths_by_the_first_call(dtype: torch.dtype) -> None:
    """FLUX hands its transformer t / 1000."""
    for times in (FIFTY, [1000.0, 964.3, 921.7, 871.2, 35.1], [999.0, 500.0, 1.0]):
        given = [float((torch.tensor(t, dtype=dtype) / 1000).to(dtype)) for t in times]
        for start in (0, len(times) // 2):  # a second expert takes over in the middle
            clock = StepClock(times)
            assert [clock.step(t) for t in given[start:]] == list(range(start, len(times)))
            clock = StepClock(times)
            assert [clock.step(t) for t in times[start:]] == list(range(start, len(times)))
    clock = StepClock([1.0, 0.964, 0.5, 0.1])
    assert [clock.step(t) for t in (1.0, 0.964, 0.5, 0.1)] == [0, 1, 2, 3]
    clock = StepClock([1000.0, 500.0])
    assert clock.step(1.0) == 0
    with pytest.raises(StepStateError, match="timestep 1100"):
        clock.step(1.1)


def test_clock_counts_two_calls_a_step_that_have_no_branch() -> None:
    clock = StepClock([30.0, 20.0, 20.0, 10.0, 10.0])
    times = [30.0] * 2 + [20.0] * 4 + [10.0] * 4
    assert [clock.step(t) for t in times] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_two_interleaved_requests_and_branches_never_see_each_other() -> None:
    state = StepState()
    keys = [(r, b, layer) for r in ("one", "two") for b in ("cond", "uncond") for layer in (0, 1)]
    for request in ("one", "two"):
        state.begin(request, FIFTY)
    for number, key in enumerate(keys):
        state.put(key, 10, {"layout": torch.full((3,), number), "lse": torch.full((2,), -number)})
    for number, key in enumerate(keys):
        assert state.get(key, "layout").tolist() == [number] * 3
        assert state.get(key, "lse").tolist() == [-number] * 2
    state.put(keys[0], 30, {"layout": torch.zeros(1)})
    with pytest.raises(StepStateError, match="holds no 'lse'"):
        state.get(keys[0], "lse")
    assert state.get(keys[1], "lse").tolist() == [-1, -1]
    state.end("one")
    assert state.running() == ["two"]
    with pytest.raises(StepStateError, match="'one' has not begun, or has ended"):
        state.get(keys[0], "layout")
    assert state.get(keys[4], "layout").tolist() == [4] * 3
    state.begin("one", FIFTY)
    with pytest.raises(StepStateError, match="holds no 'layout'"):
        state.get(keys[0], "layout")
    state.end("one")
    state.end("two")
    assert state.bytes() == 0


def test_a_skipped_refresh_is_postponed() -> None:
    state, schedule, key = StepState(), Schedule(dense=2, period=5), ("r", "c", 0)
    state.begin("r", FIFTY)
    assert [state.phase(schedule, "r", "c", s) for s in (0, 1, 2)] == [
        Phase.DENSE,
        Phase.DENSE,
        Phase.REFRESH,
    ]
    assert state.phase(schedule, "r", "c", 3) is Phase.REFRESH
    assert trace(schedule, 12) == "DDRSSRSSSSRS"
    assert state.phase(schedule, "r", "c", 6) is Phase.REFRESH
    state.put(key, 6, {"rho": torch.ones(1)})
    assert state.phase(schedule, "r", "c", 7) is Phase.SPARSE
    assert state.phase(schedule, "r", "c", 11) is Phase.REFRESH
    assert schedule.since_collected(12) == 2


def test_a_refresh_with_a_stretch_left_out_is_postponed() -> None:
    """Layer 0 stands in front of the stretch and collects at step 5; what layer 1 holds is that of step 2."""
    state, schedule = StepState(), Schedule(dense=2, period=5)
    state.begin("r", FIFTY)
    for layer in (0, 1):
        state.put(("r", "c", layer), 2, {"rho": torch.zeros(1)})
    state.put(("r", "c", 0), 5, {"rho": torch.ones(1)})
    assert state.phase(schedule, "r", "c", 6) is Phase.SPARSE
    state.miss("r", "c", 5)
    assert state.phase(schedule, "r", "c", 6) is Phase.REFRESH
    assert state.phase(schedule, "r", "other", 6) is Phase.REFRESH, "never collected"
    for layer in (0, 1):
        state.put(("r", "c", layer), 6, {"rho": torch.ones(1)})
    assert state.phase(schedule, "r", "c", 7) is Phase.SPARSE


def test_rules_of_a_request() -> None:
    state = StepState(capacity=100)
    state.begin("a", [2.0, 1.0])
    with pytest.raises(StepStateError, match="runs already"):
        state.begin("a", [2.0, 1.0])
    state.put(("a", "c", 0), 0, {"x": torch.zeros(20)})
    state.put(("a", "c", 0), 1, {"x": torch.ones(25)})
    with pytest.raises(StepStateError, match="104 bytes, the capacity is 100"):
        state.put(("a", "c", 1), 1, {"x": torch.zeros(1)})
    assert state.get(("a", "c", 0), "x").sum() == 25
    with pytest.raises(StepStateError, match="has not begun"):
        state.end("b")


def test_requests_in_threads() -> None:
    state, wrong = StepState(), []

    def request(name: str, value: int) -> None:
        for _ in range(20):
            state.begin(name, FIFTY)
            for layer in range(4):
                state.put((name, "c", layer), 0, {"x": torch.full((2,), value + layer)})
            wrong.extend(
                layer for layer in range(4) if state.get((name, "c", layer), "x")[0] != value + layer
            )
            state.end(name)

    threads = [threading.Thread(target=request, args=(f"r{i}", 100 * i)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert state.running() == []
