"""Functionalisation: bit-equal results and bit-equal inputs, on random programs and on real models."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from tilewright.compiler.functionalize import functional_form, functionalize
from tilewright.compiler.graph import is_op, mutates, print_graph

aten = torch.ops.aten


def capture(fn, *inputs) -> fx.GraphModule:
    with torch.no_grad():
        return make_fx(fn, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


def fresh(inputs):
    """The same values in other memory with the same strides."""
    return [torch.empty_strided(t.size(), t.stride(), dtype=t.dtype).copy_(t) for t in inputs]


def bits(value: torch.Tensor) -> tuple:
    return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()


def run(fn, inputs):
    given = fresh(inputs)
    with torch.no_grad():
        results = fn(*given)
    results = results if isinstance(results, list | tuple) else [results]
    return [bits(r) for r in results], [bits(g) for g in given]


def writes(gm: fx.GraphModule) -> list[fx.Node]:
    """Writes left in a graph, without the write-backs to inputs."""
    back = [n for n in gm.graph.nodes if is_op(n, aten.copy_.default) and n.args[0].op == "placeholder"]
    return [n for n in gm.graph.nodes if n.op == "call_function" and mutates(n) and n not in back]


def check(fn, *inputs, refusals: int = 0) -> fx.GraphModule:
    expected = run(fn, inputs)
    gm = capture(fn, *fresh(inputs))
    assert run(gm, inputs) == expected, "the capture itself differs"
    result = functionalize(gm)
    gm.graph.lint()
    assert run(gm, inputs) == expected, print_graph(gm.graph)
    assert len(result.refused) == refusals, result.refused
    if not refusals:
        assert not writes(gm), print_graph(gm.graph)
    backs = [n for n in gm.graph.nodes if is_op(n, aten.copy_.default) and n.args[0].op == "placeholder"]
    assert sorted(n.args[0].name for n in backs) == sorted(result.mutated)
    return gm


def test_write_through_a_slice_is_seen_by_base_and_sibling():
    def fn(x):
        left, right = x[:, :3], x[:, 2:]
        left.mul_(2.0)
        right.add_(1.0)
        return left + 0, x.sum(1), right

    gm = check(fn, torch.randn(3, 5))
    assert not writes(gm)


def test_overlapping_views_and_two_levels():
    def fn(x):
        rows = x.t()[1:4]
        rows[::2].fill_(7.0)
        x.view(-1)[3:9].mul_(-1.0)
        return rows.clone(), x.reshape(-1)

    check(fn, torch.randn(4, 6))


def test_output_that_is_a_view_of_a_written_input_stays_a_view():
    def fn(x):
        x.add_(1)
        return x[1:]

    gm = check(fn, torch.zeros(4))
    x = torch.zeros(4)
    (out,) = [gm(x)]
    out.fill_(5.0)
    assert torch.equal(x, torch.tensor([1.0, 5.0, 5.0, 5.0]))


def test_outputs_that_share_memory_with_each_other_still_do():
    def fn(x):
        y = x.clone()
        y[0] = 3.0
        return y, y[1:]

    gm = check(fn, torch.zeros(3, 2))
    whole, part = gm(torch.zeros(3, 2))
    part.fill_(9.0)
    assert float(whole[2, 1]) == 9.0


def test_swap_of_two_inputs():
    def fn(x, y):
        keep = x.clone()
        x.copy_(y)
        y.copy_(keep)
        return x + y

    check(fn, torch.randn(3), torch.randn(3))


def test_old_value_returned_after_a_write():
    def fn(x):
        keep = torch.empty_like(x)
        keep.copy_(x)
        x.zero_()
        return keep

    check(fn, torch.randn(4))


def test_casts_and_broadcasts_of_copy():
    def fn(x, i):
        x[1:].copy_(i)
        x[0] = 2
        i.copy_(x[0])
        return x * 1.5

    check(fn, torch.randn(3, 4), torch.arange(4))


def test_in_place_keeps_the_dtype_of_its_argument():
    def fn(x, y):
        x.mul_(y)
        return x

    check(fn, torch.randn(4), torch.randn(4, dtype=torch.float64))


def test_index_writes():
    def fn(cache, new, at, mask):
        cache.index_copy_(1, at, new)
        cache[:, at + 1] = new * 2
        cache.masked_fill_(mask, 0.5)
        cache.index_add_(1, at, new)
        return cache.sum(0)

    at = torch.tensor([3, 0])
    check(fn, torch.randn(2, 6, 3), torch.randn(2, 2, 3), at, torch.rand(2, 6, 3) > 0.6)


def test_out_arguments():
    def fn(x, y):
        out = torch.empty_like(x)
        torch.add(x, y, out=out)
        part = y[0]
        torch.mul(x[1], 2.0, out=part)
        return out, y

    check(fn, torch.randn(3, 4), torch.randn(3, 4))


def test_unsqueezed_and_squeezed_and_reshaped_views():
    def fn(x):
        x.unsqueeze(1).add_(1.0)
        x.view(2, 3, 4).select(1, 2).mul_(3.0)
        x.unflatten(0, (2, 3)).squeeze(0).flatten(0, 1)[4:].sub_(1.0)
        torch.diagonal(x, 1).fill_(0.25)
        return x.expand(2, 6, 4) * 2

    check(fn, torch.randn(6, 4))


def test_chunk_split_unbind_views():
    def fn(x):
        a, b, c = x.chunk(3, 1)
        b.add_(a)
        first, *_ = x.unbind(0)
        first.mul_(2.0)
        parts = x.split([2, 5], 1)
        parts[1].sub_(c.sum())
        return a, b, c, torch.cat(parts, 1)

    check(fn, torch.randn(3, 7))


def test_reshape_that_copies_is_not_a_view():
    def fn(x):
        flat = x.t().reshape(-1)
        x.add_(1.0)
        flat.mul_(2.0)
        return flat, x.t().contiguous(), x.to(torch.float32)

    check(fn, torch.randn(3, 4))


def test_even_odd_writes_into_empty_like():
    """The rotary embedding of Wan: strided halves written into uninitialised memory."""

    def fn(x, cos, sin):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(x)
        out[..., 0::2] = a * cos - b * sin
        out[..., 1::2] = a * sin + b * cos
        return out.type_as(x)

    gm = check(fn, torch.randn(2, 5, 8), torch.randn(5, 4), torch.randn(5, 4))
    assert sum(is_op(n, aten.slice_scatter.default) for n in gm.graph.nodes) == 2


def test_same_slot_written_twice_leaves_one_scatter():
    def fn(x):
        y = torch.zeros(2, 4)
        part = y[:, 1:3]
        part.copy_(x)
        part.mul_(2.0)
        return y

    gm = check(fn, torch.randn(2, 2))
    assert sum(is_op(n, aten.slice_scatter.default) for n in gm.graph.nodes) == 1


def test_graph_without_writes_is_left_alone():
    gm = capture(lambda x: torch.relu(x.t()), torch.randn(2, 3))
    before = print_graph(gm.graph)
    result = functionalize(gm)
    assert (result.mutated, result.refused, result.rewritten) == ({}, [], 0)
    assert print_graph(gm.graph) == before


REFUSED = {
    "as_strided": (lambda x: (x.as_strided((2,), (2,)).add_(1.0), x)[1], "strides"),
    "resize": (lambda x: (x.clone().unsqueeze_(0).add_(1.0), x)[0], "changes the shape"),
    "random": (lambda x: (x.bernoulli_(0.5) * 0, x * 0)[0], "random"),
    "bit view": (lambda x: (x.view(torch.int32).add_(1), x)[1], "not modelled"),
    "statistics": (
        lambda x: torch.batch_norm(x, None, None, *(torch.zeros(3), torch.ones(3)), True, 0.1, 1e-5, False),
        "running statistics",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_modelled_stays_in_place_with_a_reason(name):
    fn, reason = REFUSED[name]
    x = torch.randn(4, 3)
    gm = capture(fn, x.clone())
    result = functionalize(gm)
    assert result.refused, print_graph(gm.graph)
    assert reason in result.refused[0][1]
    if name != "random":
        assert run(gm, [x]) == run(fn, [x])


def test_refused_memory_does_not_hold_back_the_rest():
    def fn(x, y):
        x.view(torch.int32).add_(1)
        y[0].add_(1.0)
        y[1].copy_(x[0])
        x.view(torch.int32).sub_(1)
        return x + y

    gm = capture(fn, torch.randn(2, 3), torch.randn(2, 3))
    result = functionalize(gm)
    assert len(result.refused) == 1
    assert list(result.mutated) == ["y_1"]
    inputs = [torch.randn(2, 3), torch.randn(2, 3)]
    assert run(gm, inputs) == run(fn, inputs)


def test_inputs_that_share_memory_are_refused():
    def fn(x, y):
        x.add_(1.0)
        return y * 2

    base = torch.randn(4)
    gm = capture(fn, base[:3], base[1:])
    result = functionalize(gm)
    assert "share memory" in result.refused[0][1]
    assert is_op(writes(gm)[0], aten.add_.Tensor)


def test_functional_forms():
    assert functional_form(aten.add_.Tensor) is aten.add.Tensor
    assert functional_form(aten.scatter_.value_reduce) is aten.scatter.value_reduce
    assert functional_form(aten.__ior__.Scalar) is aten.__or__.Scalar
    assert functional_form(aten.mul.out) is aten.mul.Tensor
    assert functional_form(aten._foreach_add_.Scalar) is None
