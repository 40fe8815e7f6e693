"""Models that enter autocast themselves."""

from __future__ import annotations

import pytest
import torch

from tilewright.frontends.capture import from_dynamo


def capture(function, x):
    programs = []

    def backend(gm, example_inputs):
        programs.append(from_dynamo(gm, example_inputs))
        return programs[-1].module

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)(x), programs


@pytest.mark.parametrize(("dtype", "enabled"), [(torch.float32, True), (torch.bfloat16, False)])
def test_region_that_casts_nothing_is_dropped(dtype, enabled):
    def function(x):
        with torch.autocast("cpu", dtype, enabled):
            y = x @ x
        return y + 1

    x = torch.randn(5, 5)
    out, (program,) = capture(function, x)
    assert torch.equal(out, function(x))
    assert {n.target for n in program.graph.nodes if n.op == "call_function"} == {
        torch.ops.aten.matmul.default,
        torch.ops.aten.add.Tensor,
    }


def test_region_that_casts_is_an_error():
    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x

    with pytest.raises(Exception, match="enters autocast.'cpu', torch.bfloat16. itself"):
        capture(function, torch.randn(5, 5))


def test_disabling_inside_an_enabled_autocast_is_an_error():
    def function(x):
        with torch.autocast("cpu", enabled=False):
            return x @ x

    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Exception, match="enters autocast"):
        capture(function, torch.randn(5, 5))
