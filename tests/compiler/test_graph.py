"""FX helpers: schema form, purity, dead code, comparison and the text form."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from tilewright.compiler.graph import (
    arg,
    dead_code,
    insert_like,
    is_impure,
    normalized_args,
    output_node,
    print_graph,
    rank,
    same,
    set_positional,
    shape,
    static_shape,
    structural_difference,
    val,
)

aten = torch.ops.aten


def capture(fn, *inputs, mode: str = "fake") -> fx.GraphModule:
    with torch.no_grad():
        return make_fx(fn, pre_dispatch=True, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)


def call(target, *args, **kwargs) -> fx.Node:
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name in "xyz"}
    resolved = [inputs.get(a, a) if isinstance(a, str) else a for a in args]
    return graph.call_function(target, tuple(resolved), kwargs)


def test_values_and_shapes():
    gm = capture(lambda x: (x.sum(0), x.shape[0] + 1)[0], torch.randn(3, 4), mode="symbolic")
    x = next(iter(gm.graph.nodes))
    total = next(n for n in gm.graph.nodes if n.target is aten.sum.dim_IntList)
    assert (rank(x), rank(total), static_shape(x)) == (2, 1, None)
    assert all(isinstance(s, torch.SymInt) for s in shape(x))
    assert (val(3), shape(3), rank(None)) == (3, None, None)


def test_normalized_args_fill_defaults():
    node = call(aten.scaled_dot_product_attention.default, "x", "y", "z", is_causal=True, scale=0.5)
    given = normalized_args(node)
    assert list(given) == [
        "query",
        "key",
        "value",
        "attn_mask",
        "dropout_p",
        "is_causal",
        "scale",
        "enable_gqa",
    ]
    assert (given["attn_mask"], given["dropout_p"], given["is_causal"], given["scale"]) == (
        None,
        0.0,
        True,
        0.5,
    )
    assert arg(node, "enable_gqa") is False


@pytest.mark.parametrize(
    ("node", "args", "kwargs"),
    [
        (call(aten.sum.dim_IntList, "x", dim=(1,), keepdim=False), ([1],), {}),
        (call(aten.softmax.int, "x", dim=-1, dtype=None), (-1,), {}),
        (call(aten.dropout.default, "x", p=0, train=False), (0.0, False), {}),
        (call(aten.add.Tensor, "x", other=2, alpha=1), (2,), {}),
        (call(aten.add.Tensor, "x", other=2, alpha=2), (2,), {"alpha": 2}),
        (call(aten.contiguous.default, "x", memory_format=torch.contiguous_format), (), {}),
    ],
)
def test_set_positional(node, args, kwargs):
    assert set_positional(node)
    assert same(node.args[1:], args)
    assert same(node.kwargs, kwargs)
    assert not set_positional(node)


def test_set_positional_leaves_what_is_no_default():
    node = call(aten.add.Tensor, "x", 2, alpha=1.0)
    assert not set_positional(node)
    assert dict(node.kwargs) == {"alpha": 1.0}


def test_purity():
    attention = aten.scaled_dot_product_attention.default
    assert not is_impure(call(attention, "x", "y", "z"))
    assert is_impure(call(attention, "x", "y", "z", None, 0.1))
    assert not is_impure(call(aten.dropout.default, "x", 0.5, False))
    assert not is_impure(call(aten.dropout.default, "x", 0.0, True))
    assert is_impure(call(aten.dropout.default, "x", 0.5, True))
    assert is_impure(call(aten.rand.default, [2]))
    assert is_impure(call(aten.add_.Tensor, "x", 1))
    assert is_impure(call(aten.add.out, "x", "y", out="z"))
    assert is_impure(call(aten._assert_async.default, "x"))
    assert is_impure(call(torch._C._set_grad_enabled, False))
    assert not is_impure(call(operator.getitem, "x", 0))


def test_dead_code_keeps_effects():
    def fn(x):
        unused = x.sin().cos()
        x.add_(1)
        torch.rand(2)
        return x * 2 if unused is not None else x

    gm = capture(fn, torch.randn(2))
    assert dead_code(gm.graph) == ["cos", "sin"]
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [
        aten.add_.Tensor,
        aten.rand.default,
        aten.mul.Tensor,
    ]


def test_insert_like_computes_value_and_copies_source():
    gm = capture(lambda x: x.relu(), torch.randn(2, 3))
    relu = next(n for n in gm.graph.nodes if n.target is aten.relu.default)
    relu.meta["stack_trace"] = "line 7"
    new = insert_like(gm.graph, output_node(gm.graph), aten.sum.dim_IntList, (relu, [1]), relu)
    assert (static_shape(new), new.meta["stack_trace"]) == ((2,), "line 7")
    assert val(new).fake_mode is val(relu).fake_mode


def model(x, w, b):
    y = torch.nn.functional.linear(x, w, b)
    return y.relu() + x, y


X, W, B = torch.randn(2, 3), torch.randn(3, 3), torch.randn(3)

DIFFERENT = {
    "another op": (lambda x, w, b: _with(lambda y: y.tanh() + x, x, w, b), "tanh"),
    "another operand order": (lambda x, w, b: _with(lambda y: x + y.relu(), x, w, b), "relu"),
    "another constant": (
        lambda x, w, b: _with(lambda y: torch.add(y.relu(), x, alpha=2), x, w, b),
        "alpha=2",
    ),
    "an op computed twice": (
        lambda x, w, b: (
            torch.nn.functional.linear(x, w, b).relu() + x,
            torch.nn.functional.linear(x, w, b),
        ),
        "shared",
    ),
    "one effect more": (lambda x, w, b: (x.add_(1), *model(x, w, b))[1:], "effects"),
    "swapped outputs": (lambda x, w, b: tuple(reversed(model(x, w, b))), "against"),
}


def _with(fn, x, w, b):
    y = torch.nn.functional.linear(x, w, b)
    return fn(y), y


def test_equal_graphs_have_no_difference():
    a, b = capture(model, X, W, B), capture(model, X, W, B)
    for node in b.graph.nodes:
        node.name = f"other_{node.name}"
    assert structural_difference(a, b) is None
    assert print_graph(a.graph) == print_graph(b.graph)


def test_order_of_independent_nodes_does_not_matter():
    a = capture(lambda x: x.sin() + x.cos(), X)
    b = capture(lambda x: [c := x.cos(), x.sin() + c][1], X)
    assert structural_difference(a, b) is None


@pytest.mark.parametrize("name", DIFFERENT)
def test_differences_are_found_and_named(name):
    fn, word = DIFFERENT[name]
    message = structural_difference(capture(model, X, W, B), capture(fn, X, W, B))
    assert message is not None
    assert word in message


def test_inputs_may_be_matched_by_name():
    a = capture(lambda x, y: x - y, X, X + 1)
    b = capture(lambda y, x: x - y, X, X + 1)
    assert structural_difference(a, b) is not None
    names_a, names_b = ([n.name for n in g.graph.nodes if n.op == "placeholder"] for g in (a, b))
    crossed = dict(zip(names_a, reversed(names_b), strict=True))
    assert structural_difference(a, b, crossed) is None


def test_constants_are_compared_by_value():
    def plus(number):
        return capture(lambda x: x + torch.tensor([number, 2.0, 3.0]), X)

    a, b, c = plus(1.0), plus(1.0), plus(5.0)
    assert structural_difference(a, b) is None
    assert "constants differ" in structural_difference(a, c)


def test_printed_graph():
    gm = capture(lambda x: torch.softmax(x.transpose(0, 1), -1)[0], X)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta["nn_module_stack"] = {"a": ("L['self'].blocks.0.attn", "A")}
    assert print_graph(gm.graph).splitlines() == [
        "%0 f32[2, 3] = input",
        "%1 f32[3, 2] = transpose.int(%0, 0, 1)  # blocks.0.attn",
        "%2 f32[3, 2] = softmax.int(%1, -1)  # blocks.0.attn",
        "%3 f32[2] = select.int(%2, 0, 0)  # blocks.0.attn",
        "return %3",
    ]
