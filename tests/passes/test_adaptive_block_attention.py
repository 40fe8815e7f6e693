"""AdaSpa: block mass, tiers, phases with state between steps, two requests that take turns."""

from __future__ import annotations

import pytest
import torch

from tilewright.compiler import ops
from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.log import Fuel
from tilewright.compiler.passes_base import Example, Tensor
from tilewright.compiler.pipeline import RunOptions, run_pass
from tilewright.compiler.replay import relative_rms
from tilewright.compiler.selftest import capture_example
from tilewright.passes.attention._block_search import kept_per_row, lists, select_heaviest, with_text_blocks
from tilewright.passes.attention.adaptive_block_attention import AdaptiveBlockAttention
from tilewright.runtime.step_state import StepState, StepStateError

GRID, TEXT = (4, 6, 6), 5
FACTS = {"video_grid": GRID, "text_segment": (144, TEXT)}
HOW = {"block": 16, "sparsity": 0.6, "threshold": 0.5}


def drawn(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(2, 4, 144 + TEXT, 8, generator=generator) for _ in range(3))


def compiled(phase: str):
    """The program of one phase as a function of q, k, v."""
    example = Example(lambda q, k, v: ops.attention(q, k, v), drawn(0), facts=FACTS)
    program = capture_example(example)
    report = run_pass(
        AdaptiveBlockAttention(phase=phase, **HOW), program, RunOptions(verify="shapes"), Fuel()
    )
    assert len(report.applied) == 1, [r.reason for r in report.refused]
    program.module.recompile()

    def call(*inputs):
        out = program.module(*inputs)
        return out[0] if isinstance(out, (tuple, list)) else out

    return call


def test_block_mass_sums_to_the_rows() -> None:
    q, k, v = (t.double() for t in drawn(1))
    dense = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, -1)
    lse = torch.logsumexp(q @ k.transpose(-1, -2) * 8**-0.5, -1)
    borders = torch.tensor([[0, 16, 48, 100, 149]], dtype=torch.int32)
    mass = ops.block_mass(q, k, lse, borders, borders)
    assert torch.allclose(mass.sum(-1), torch.tensor([16.0, 32, 52, 49]).double().expand(2, 4, 4), rtol=1e-12)
    assert torch.allclose(mass.sum((-1, -2)), torch.full((2, 4), 149.0).double(), rtol=1e-12)
    assert torch.allclose(mass[:, :, 1, 2], dense[:, :, 16:48, 48:100].sum((-1, -2)), rtol=1e-12)
    kept = torch.rand(2, 1, 1, 149) > 0.3
    scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~kept, float("-inf"))
    masked = ops.block_mass(q, k, torch.logsumexp(scores, -1), borders, borders, kept)
    assert torch.allclose(
        masked[:, :, 0, 0], torch.softmax(scores, -1)[:, :, :16, :16].sum((-1, -2)), rtol=1e-12
    )


def test_tiers_keep_the_mean_sparsity() -> None:
    """Two heads with one heavy block per row, two flat ones and four between, as in the paper's example."""
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(1, 8, 20, 20, generator=generator) * 0.1 + 0.5
    mass[:, :2] *= 0.001
    for row in range(20):
        mass[:, :2, row, (row * 7) % 20] = 10.0
    chosen = select_heaviest(mass, 0.8, 0.8, True)
    rows = chosen.sum(-1)
    assert (rows == rows[:, :, :1]).all(), "every row of a head keeps the same number"
    counts = rows[0, :, 0].tolist()
    assert counts[:2] == [2, 2], "the sharp heads give half of their blocks"
    assert sorted(counts[2:]) == [4, 4, 4, 4, 6, 6], "to the flattest ones"
    assert abs(float(chosen.double().mean()) - 0.2) < 1e-12
    assert kept_per_row(20, 0.999) == 1


@pytest.mark.parametrize("adaptive", [True, False])
def test_sparsity_zero_keeps_all(adaptive: bool) -> None:
    assert select_heaviest(torch.rand(2, 3, 5, 5), 0.0, 0.8, adaptive).all()


def test_lists_of_a_selection() -> None:
    text = torch.tensor([True, False, False, False, True])
    chosen = torch.rand(2, 3, 3, 3) > 0.5
    mask = with_text_blocks(chosen, text)
    assert mask[:, :, 0].all()
    assert mask[:, :, :, 4].all()
    assert torch.equal(mask[:, :, 1:4, 1:4], chosen)
    row_ptr, col, groups = lists(mask)
    assert groups.tolist() == [[0, 1, 2], [3, 4, 5]]
    for g in range(6):
        for row in range(5):
            found = col[g, row_ptr[g, row] : row_ptr[g, row + 1]].tolist()
            assert found == mask.flatten(0, 1)[g, row].nonzero().flatten().tolist()


def test_two_interleaved_requests_never_see_each_other() -> None:
    """search, sparse and cached-search of two requests and two branches in turns, against stateless calls."""
    search, cached, sparse, every = map(compiled, ("search", "cached-search", "sparse", "every"))
    state, keys = StepState(), [(r, b) for r in ("one", "two") for b in ("cond", "uncond")]
    inputs = {key: drawn(10 + i) for i, key in enumerate(keys)}
    for request in ("one", "two"):
        state.begin(request, [3.0, 2.0, 1.0])
    for key in keys:
        with state.call(*key, 0):
            q, k, v = inputs[key]
            assert relative_rms(search(q, k, v), ops.attention(q, k, v)) < 2e-6
    for key in reversed(keys):
        with state.call(*key, 1):
            assert relative_rms(sparse(*inputs[key]), every(*inputs[key])) < 2e-6
    for key in keys:
        before = state.get((*key, 0), "col").clone()
        with state.call(*key, 2):
            assert relative_rms(cached(*inputs[key]), every(*inputs[key])) < 2e-6
        assert torch.equal(state.get((*key, 0), "col"), before), "unchanged q and k: the same layout"
    other = drawn(99)
    with state.call("one", "cond", 2):
        kept = sparse(*other)
    assert relative_rms(kept, every(*other)) > 1e-3, "it attends the blocks of the search, not its own"
    state.end("one")
    with pytest.raises(StepStateError, match="'one' has not begun"), state.call("one", "cond", 2):
        sparse(*other)


def test_state_needs_a_request() -> None:
    with pytest.raises(RuntimeError, match="no request is running"):
        compiled("sparse")(*drawn(0))
    state = StepState()
    state.begin("r", [1.0])
    with pytest.raises(StepStateError, match="holds no 'row_ptr'"), state.call("r", "c", 0):
        compiled("sparse")(*drawn(0))


def test_wan(video_program, float64_outputs) -> None:
    original, sparse, reference, whole = (video_program("wan") for _ in range(4))
    value = AdaptiveBlockAttention(block=16, sparsity=0.5, threshold=0.6)
    for program, how in ((sparse, value), (whole, value.exact_limit())):
        assert len(run_pass(how, program, RunOptions(verify="shapes"), Fuel()).applied) == 2
    value.reference(reference)
    want = float64_outputs(reference)[0]
    assert relative_rms(float64_outputs(sparse)[0], want) < 1e-12
    before = float64_outputs(original)[0]
    assert relative_rms(float64_outputs(whole)[0], before) < 1e-12
    assert relative_rms(want, before) > 1e-7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsity": 0.2}, "1/3"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1, "head_adaptive": False}, "0 up to less than 1"),
        ({"block": 24}, "multiple of 16"),
        ({"threshold": 2.0}, "0 to 1"),
    ],
)
def test_illegal_options(options, said) -> None:
    with pytest.raises(OptionError, match=said):
        AdaptiveBlockAttention(**options)


def test_masks_that_hide_video_are_refused() -> None:
    example = Example(
        lambda q, k, v, m: ops.attention(q, k, v, m),
        (*(Tensor(1, 2, 149, 8),) * 3, Tensor(1, 1, 1, 149, dtype=torch.bool)),
        facts=FACTS,
    )
    report = run_pass(AdaptiveBlockAttention(), capture_example(example), RunOptions(), Fuel())
    assert "may hide video tokens" in report.refused[0].reason
