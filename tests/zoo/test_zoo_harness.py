"""The harness of the zoo: the float64 truth, the acceptance rule, counting, crashes and the command line."""

from __future__ import annotations

import json
import os
from functools import partial

import pytest
import torch
from torch import fx, nn

from tilewright.compiler import ops
from tilewright.compiler.program import Program
from tilewright.tools.zoo import main, summary, survey, table
from tilewright.tools.zoo_entry import COUNTED, ZooEntry, counts
from tilewright.tools.zoo_measure import (
    Row,
    Settings,
    Widened,
    count_semantic_ops,
    default_dtype,
    grouped_mm,
    judge,
    measure,
    relative_rms,
    run_float64,
)
from tilewright.tools.zoo_models import select


class Narrowing(nn.Module):
    """Asks for float32 in every way that models do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, x):
        positions = torch.arange(5, dtype=torch.float32) + torch.full((5,), 0.1)
        y = x.float() * self.weight.to(torch.float32) / 3 + positions
        return (torch.softmax(y, -1, dtype=torch.float32).type_as(x),)


def small(build=Narrowing) -> ZooEntry:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=generator)
    return ZooEntry("small", "decoder", lambda: build().eval(), lambda: ((x,), {}), counts(), 1)


def empty_row() -> Row:
    return Row("small", "decoder", 1, counts())


def test_float64_run_is_float64_even_where_the_model_narrows():
    (truth,) = run_float64(small())
    x, weight = small().inputs()[0][0].double(), Narrowing().weight.detach().double()
    by_hand = torch.softmax(x * weight / 3 + torch.arange(5).double() + 0.1, -1)
    assert truth.dtype == torch.float64
    assert relative_rms(truth, by_hand) < 1e-15
    plain = Narrowing().double()(x)[0].detach()
    assert relative_rms(plain, by_hand) > 1e-9, "without widening the same run is only good to float32"


def test_grouped_mm_is_what_torch_means():
    rows, weights = torch.randn(7, 16), torch.randn(3, 16, 8)
    offs = torch.tensor([2, 2, 7], dtype=torch.int32)
    theirs = torch.nn.functional.grouped_mm(rows, weights, offs=offs)
    with Widened(), default_dtype(torch.float64):
        ours = torch.nn.functional.grouped_mm(rows.double(), weights.double(), offs=offs)
    assert ours.dtype == torch.float64
    assert relative_rms(theirs, ours) < 1e-6
    with pytest.raises(ValueError, match="bias"):
        grouped_mm(rows, weights, offs, bias=torch.zeros(8))


@pytest.mark.parametrize(("factor", "wrong"), [(3.9, False), (4.5, True)])
def test_acceptance_is_four_times_eager_and_eight_ulps(factor, wrong):
    truth = torch.ones(100, dtype=torch.float64)
    row, eager = empty_row(), truth * (1 + 1e-4)
    judge(row, [eager], [truth * (1 + 1e-4 * factor)], [truth])
    assert bool(row.wrong) is wrong
    assert row.error_ours == pytest.approx(1e-4 * factor, rel=1e-3)
    assert row.distance == pytest.approx(1e-4 * (factor - 1), rel=1e-2)
    exact = empty_row()
    judge(exact, [truth], [truth * (1 + 9 * 2.0**-23)], [truth])
    assert exact.wrong


def test_non_finite_shape_and_number_of_outputs_are_judged():
    truth = torch.tensor([1.0, float("-inf"), 2.0])
    assert relative_rms(truth, truth) == 0.0
    assert relative_rms(torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([1.0, 1.0, 2.0])) == float("inf")
    assert relative_rms(truth[:2], truth) == float("inf")
    assert relative_rms(torch.zeros(3), torch.zeros(3)) == 0.0
    row = empty_row()
    judge(row, [truth, truth], [truth], [truth, truth])
    assert row.wrong == "1 outputs instead of 2"


def test_fused_ops_count_as_what_they_fuse():
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    both = graph.call_function(ops.linear_multi, (x, [w, w, w], [None, None, None]))
    first = graph.call_function(torch.ops.aten.relu.default, (x,))
    normed = graph.call_function(ops.add_rms_norm, (first, x, w, 1e-6))
    graph.output((both, normed, graph.call_function(ops.linear, (x, w))))
    program = Program(fx.GraphModule(nn.Module(), graph), [], [], origin="dynamo")
    assert count_semantic_ops(program) == counts((1, {"linear": 4, "rms_norm": 1}))


class Broken(Narrowing):
    """Breaks the graph on purpose."""

    def forward(self, x):
        if x.sum() > 1e9:
            return (x,)
        torch._dynamo.graph_break()
        return super().forward(x)


def test_graph_breaks_are_reported_with_the_users_line():
    row = measure(small(Broken), Settings(backend="eager"))
    assert row.good
    assert not row.whole
    assert row.graphs >= 2
    assert any("test_zoo_harness.py" in found["line"] and found["reason"] for found in row.breaks)


class Raising(Narrowing):
    """Fails when run."""

    def forward(self, x):
        raise RuntimeError(f"no {x.shape}")


def test_a_crash_is_a_row_that_says_where():
    row = measure(small(Raising), Settings(backend="eager"))
    assert "RuntimeError: no torch.Size([3, 5]) at" in row.crash
    assert not row.good
    assert summary([row])["crashed"] == ["small"]


def test_a_model_that_kills_its_process_costs_one_row():
    chosen = select(["llama", "gpt2", "bert"])
    seen = []
    rows = survey(chosen, 2, partial(os.execlp, "false"), seen.append)
    assert [row.name for row in rows] == ["llama", "gpt2", "bert"]
    assert all("process died" in row.crash for row in rows)
    assert len(seen) == 3


def test_table_shows_only_the_ops_that_differ():
    row = Row("m", "decoder", 2, counts((2, {"linear": 7, "rope": 2})), graphs=1)
    row.found = {**row.expected, "rope": 1}
    assert row.missing == {"rope": (1, 4)}
    assert list(table([row]).columns[3].cells) == ["rope 1/4"]
    row.found = dict(row.expected)
    assert list(table([row]).columns[3].cells) == ["all 18"]


def test_command_line_surveys_and_writes_json(tmp_path, capsys):
    target = tmp_path / "zoo.json"
    assert main(["gpt2", "distilbert", "--backend", "eager", "--json", str(target)]) == 0
    data = json.loads(target.read_text())
    assert [row["name"] for row in data["rows"]] == ["gpt2", "distilbert"]
    assert data["summary"]["whole"] == 2
    assert data["rows"][0]["error_ours"] < 1e-5
    assert "distilbert" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gtp2"], "did you mean gpt2"),
        (["--jobs", "0"], "--jobs 0: expected 1 or more"),
        (["--json", "nowhere/at/all.json"], "its folder does not exist"),
        (["--lower", "triton"], "invalid choice"),
    ],
)
def test_bad_arguments_exit_two_with_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_list_names_every_entry(capsys):
    assert main(["state-space", "--list"]) == 0
    assert "falcon-mamba" in capsys.readouterr().out


def test_an_entry_must_name_every_counted_op():
    with pytest.raises(ValueError, match="it must name"):
        ZooEntry("x", "decoder", nn.Module, lambda: ((), {}), {"linear": 1}, 1)
    with pytest.raises(ValueError, match="family 'llm'"):
        ZooEntry("x", "llm", nn.Module, lambda: ((), {}), dict.fromkeys(COUNTED, 0), 1)
