"""The torch.compile backend: right results for every way a user may change a model between calls."""

import copy

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright.compiler.replay import relative_rms
from tilewright.frontends.compile import REPORTS

EAGER = {"lower": "eager"}


class Block(nn.Module):
    """Residual block with a gated MLP: everything the exact pipeline touches but attention."""

    def __init__(self, width: int = 24, hidden: int = 40) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(width))
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = x + y
        n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        return h + self.down(nn.functional.silu(self.gate(n)) * self.up(n))


def inputs(seed: int = 0, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 5, 24, generator=g), torch.randn(batch, 5, 24, generator=g)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(got: torch.Tensor, want: torch.Tensor, bound: float = 2e-6) -> None:
    assert relative_rms(got, want) < bound
    assert relative_rms(got, want.roll(1, -1)) > 100 * bound, "the inputs cannot tell right from wrong"


@pytest.mark.parametrize("pipeline", ["exact", "fold-norm-scale", "fold-norm-scale,fuse-projections"])
def test_second_instance_replaced_parameter_and_in_place_update(pipeline: str) -> None:
    model, other = Block().eval(), Block().eval()
    options = {**EAGER, "pipeline": pipeline}
    with torch.no_grad():
        for m in (model, other, model):
            compiled = torch.compile(m, backend="tilewright", options=options, fullgraph=True)
            assert_same(compiled(*inputs()), m(*inputs()))
        compiled = torch.compile(model, backend="tilewright", options=options, fullgraph=True)
        model.gate.weight = nn.Parameter(torch.randn_like(model.gate.weight))
        assert_same(compiled(*inputs(1)), model(*inputs(1)))
        model.gain.mul_(3.0)
        assert_same(compiled(*inputs(2)), model(*inputs(2)))
        model.load_state_dict(other.state_dict())
        assert_same(compiled(*inputs(3)), other(*inputs(3)))
    assert sum(len(p.applied) for p in REPORTS[-1].passes if p.name in pipeline or pipeline == "exact") >= 1


def test_derived_buffers_would_be_stale_without_the_check() -> None:
    """The mutant: skip the identity and version check and the in-place update goes unnoticed."""
    from tilewright.compiler.program import DerivedCheck

    model = Block().eval()
    options = {**EAGER, "pipeline": "fold-norm-scale"}
    call, DerivedCheck.__call__ = DerivedCheck.__call__, lambda self, args: None
    try:
        with torch.no_grad():
            compiled = torch.compile(model, backend="tilewright", options=options)
            compiled(*inputs())
            model.gain.mul_(3.0)
            assert relative_rms(compiled(*inputs()), model(*inputs())) > 1e-2
    finally:
        DerivedCheck.__call__ = call


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_training_gradients(lower: str) -> None:
    model = Block()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="tilewright", options={"lower": lower}, fullgraph=True)
    x, y = inputs()
    compiled(x, y).square().sum().backward()
    reference(x, y).square().sum().backward()
    for (name, got), want in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert relative_rms(got.grad, want.grad) < 5e-6, name
    report = REPORTS[-1]
    assert report.training
    assert report.applied("match-rms-norm") == 1
    assert report.applied("fuse-projections") == 1


def test_weight_passes_are_skipped_in_training_and_say_so() -> None:
    model = Block()
    compiled = torch.compile(model, backend="tilewright", options={**EAGER, "pipeline": "fold-norm-scale"})
    compiled(*inputs()).sum().backward()
    skipped = [p for p in REPORTS[-1].passes if p.name == "fold-norm-scale"]
    assert "inference" in skipped[0].skipped
    assert not skipped[0].applied


def test_inductor_runs_the_rest() -> None:
    model = Block().eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend="tilewright", fullgraph=True, dynamic=False)
        assert_same(compiled(*inputs()), model(*inputs()))
        few = {k["op"]: k for k in REPORTS[-1].kernels}
        assert_same(compiled(*inputs(0, 200)), model(*inputs(0, 200)))
    many = {k["op"]: k for k in REPORTS[-1].kernels}
    assert few["add_rms_norm"]["kernel"] == "inductor"
    assert "Inductor's own fusion costs less" in few["add_rms_norm"]["why"]
    assert many["add_rms_norm"]["kernel"].startswith("add_rms_norm_")


def test_dynamic_shapes_compile_once() -> None:
    model = Block().eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend="tilewright", options=EAGER, dynamic=True, fullgraph=True)
        before = len(REPORTS)
        for batch in (2, 3, 7, 16, 33):
            assert_same(compiled(*inputs(batch, batch)), model(*inputs(batch, batch)))
    assert len(REPORTS) - before == 1


def test_a_number_of_a_module_is_known_under_dynamic_shapes_and_guarded() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(6)), 1e-3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))

    model = Norm().eval()
    compiled = torch.compile(model, backend="tilewright", options=EAGER, dynamic=True, fullgraph=True)
    before = len(REPORTS)
    with torch.no_grad():
        for rows in (3, 5, 9):
            assert_same(compiled(torch.eye(rows, 6)), model(torch.eye(rows, 6)))
        assert len(REPORTS) - before == 1
        assert [k["op"] for k in REPORTS[-1].kernels] == ["rms_norm"]
        for step in range(1, 7):
            model.eps = float(step)
            assert_same(compiled(torch.eye(4, 6)), model(torch.eye(4, 6)))
    # One that keeps changing becomes an input again.
    assert len(REPORTS) - before == 4
    assert REPORTS[-1].kernels == []


def test_in_place_state_is_declared_and_right() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4, 6))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps.add_(1)
            self.seen[1:3].copy_(x[:2] * self.steps)
            return self.seen.sum(0) + x.mean()

    ours, plain = Counter(), Counter()
    compiled = torch.compile(ours, backend="tilewright", options=EAGER, fullgraph=True)
    with torch.no_grad():
        for seed in range(3):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(compiled(x), plain(x))
            assert torch.equal(ours.seen, plain.seen)
            assert torch.equal(ours.steps, plain.steps)


def test_options_do_not_mix() -> None:
    model = Block().eval()
    with torch.no_grad():
        torch.compile(model, backend="tilewright", options={**EAGER, "pipeline": "dead-code"})(*inputs())
        torch.compile(model, backend="tilewright", options={**EAGER, "pipeline": "fuse-add-rmsnorm"})(
            *inputs()
        )
    assert [r.pipeline for r in list(REPORTS)[-2:]] == ["dead-code", "fuse-add-rmsnorm"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pipelin": "exact"}, "did you mean 'pipeline'"),
        ({"pipeline": "fuse-add-rmsnrm"}, "did you mean 'fuse-add-rmsnorm'"),
        ({"pipeline": "fold-constants{max_elements=0}"}, "at least 1"),
        ({"pipeline": "fold-constants{max_element=4}"}, "did you mean 'max_elements'"),
        ({"pipeline": "fuse-add-rmsnorm,dead-code"}, "put dead-code before fuse-add-rmsnorm"),
        ({"pipeline": 3}, "pipeline"),
        ({"lower": "fast"}, "inductor, eager"),
        ({"verify": "all"}, "off, shapes, outputs"),
        ({"fuel": -1}, "0 or more"),
        ({"facts": {"video_gird": 3}}, "video_grid"),
        ({"require": {"attention": 9}}, "0 attention found, 9 required"),
    ],
)
def test_bad_options_are_one_clear_error(options: dict, text: str) -> None:
    from tilewright.frontends.cli import error_line

    compiled = torch.compile(Block(), backend="tilewright", options={**EAGER, **options})
    with torch.no_grad(), pytest.raises(Exception) as caught:  # noqa: PT011 - torch wraps backend errors
        compiled(*inputs())
    line = error_line(caught.value)
    assert line is not None
    assert "\n" not in line
    assert text in line


def test_the_backend_may_be_called_twice_for_one_frame() -> None:
    from tilewright.frontends.dynamo import tilewright_backend

    seen = []

    def twice(gm, example_inputs):
        before = gm.code
        tilewright_backend(gm, example_inputs, options=EAGER)
        assert gm.code == before, "the Dynamo graph was changed"
        seen.append(1)
        return tilewright_backend(gm, example_inputs, options=EAGER)

    model = Block().eval()
    with torch.no_grad():
        assert_same(torch.compile(model, backend=twice)(*inputs()), model(*inputs()))
    assert seen == [1]


def test_graph_breaks_are_reported_with_the_users_line() -> None:
    from tilewright.frontends.api import explain

    def broken(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    report = explain(broken, (torch.randn(4),), pipeline="dead-code")
    assert len(report.graph_breaks) == 1
    assert "test_backend.py:" in report.graph_breaks[0]["source"]


def test_verify_outputs_runs_every_exact_pass_in_float64() -> None:
    model = Block().eval()
    options = {**EAGER, "verify": "outputs", "pipeline": "fold-norm-scale,fuse-add-rmsnorm,fuse-projections"}
    with torch.no_grad():
        compiled = torch.compile(model, backend="tilewright", options=options)
        assert_same(compiled(*inputs()), model(*inputs()))


def test_a_graph_that_is_not_understood_is_left_alone_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    def gradient(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x

    x = torch.randn(8, 8)
    with torch.no_grad():
        got = torch.compile(gradient, backend="tilewright", options=EAGER)(x)
        assert torch.equal(got, gradient(x))
    assert "autocast" in REPORTS[-1].left_alone
    assert "left as it was" in caplog.text


def test_explain_is_of_the_sizes_given_whatever_was_compiled_before() -> None:
    model = Block().eval()
    for batch in (2, 3):
        assert not tw.explain(model, inputs(batch=batch)).sizes
