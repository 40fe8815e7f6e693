"""Captures of models that use torch.vmap, directly or through associative_scan."""

from __future__ import annotations

import pytest
import torch
from torch._functorch import predispatch
from torch._higher_order_ops.associative_scan import associative_scan

from tilewright.compiler.diagnostics import CaptureError
from tilewright.frontends.capture import from_dynamo


def scan(x):
    return associative_scan(lambda a, b: a * b + 1, x, 0, combine_mode="generic")


def nested(x, w):
    both = torch.vmap(torch.vmap(lambda row, column: (row * column).sum(), (None, 1)), (0, None))
    return both(torch.relu(x), w) + 1


def twice(x, w):
    once = torch.vmap(lambda row: row.softmax(-1) * w[0])(x)
    return torch.vmap(lambda row, scale: row * scale, (0, 0))(once, x[:, 0]), once


def capture_and_run(function, *inputs, dynamic=False):
    programs = []

    def backend(gm, example_inputs):
        before = str(gm.graph)
        programs.append(from_dynamo(gm, example_inputs))
        assert str(gm.graph) == before, "the Dynamo graph is never changed"
        return programs[-1].module

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs), programs


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("function", "shapes"), [(scan, [(5, 3)]), (nested, [(4, 3), (3, 5)]), (twice, [(4, 3), (2, 3)])]
)
def test_vmap_becomes_aten(function, shapes, dynamic):
    inputs = [
        torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)
    ]
    out, (program,) = capture_and_run(function, *inputs, dynamic=dynamic)
    torch.testing.assert_close(out, function(*inputs))
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert predispatch._add_batch_dim not in calls
    assert not any(n.op == "get_attr" for n in program.graph.nodes), "a value was baked in as a constant"
    if not dynamic:
        assert all(isinstance(t, torch._ops.OpOverload) or t.__name__ == "getitem" for t in calls)


def test_two_calls_use_their_own_inputs():
    x = torch.randn(5, 3)
    _, (program,) = capture_and_run(scan, x)
    other = torch.randn(5, 3)
    torch.testing.assert_close(program.module(other)[0], scan(other))


def test_a_lost_value_is_an_error_not_a_constant():
    def slope(x):
        return torch.func.grad(lambda y: (y * y).sum())(x)

    with pytest.raises(Exception, match="lost in tracing") as caught:
        capture_and_run(slope, torch.randn(3))
    error = caught.value
    while error is not None and not isinstance(error, CaptureError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    assert isinstance(error, CaptureError)
