"""Mutants and respellings: what is generated, that it runs, that the original stays as it was."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from tilewright.compiler import ops
from tilewright.compiler.mutate import COMMUTATIVE, KINDS, mutants, node_values
from tilewright.compiler.parity import differential_fp64
from tilewright.compiler.respell import respell

ATEN = torch.ops.aten


def attention(x, w):
    """The heart of an attention layer: heads split, scores, softmax, heads joined, output product."""
    q = x.view(2, 3, 2, 4).transpose(1, 2)
    p = torch.softmax(q @ q.transpose(-1, -2) * 0.5, -1)
    return F.linear((p @ q).permute(0, 2, 1, 3).reshape(2, 3, 8), w)


def layer(x, gain, w):
    """An attention layer: norm, rotary position, attention, gate."""
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * gain
    turned = torch.cat((-y[..., 4:], y[..., :4]), -1)
    left, right = attention(y - turned, w).chunk(2, -1)
    return F.silu(left) * right


def case(function=attention):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 8), (8, 8)) if function is attention else ((2, 3, 8), (8,), (8, 8))
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    wrapped = (lambda a, b: attention(a, b)) if function is attention else (lambda a, b, c: layer(a, b, c))
    return make_fx(wrapped, pre_dispatch=True)(*inputs), inputs


def single(function, *inputs):
    return make_fx(function, pre_dispatch=True)(*inputs), list(inputs)


def described(graph, inputs, kind):
    return {mutant.description.split(" at ")[0] for mutant in mutants(graph, inputs, [kind])}


def test_every_kind_of_near_miss_is_made_for_an_attention_layer():
    graph, inputs = case()
    before = graph.code
    kinds = collections.Counter()
    for mutant in mutants(graph, inputs):
        kinds[mutant.kind] += 1
        assert mutant.module.code != before, mutant.description
    assert graph.code == before
    assert sum(kinds.values()) >= 40
    assert set(kinds) >= {"dim", "permutation", "number", "size", "op", "cast", "drop"}
    assert set(kinds) <= set(KINDS)


SQUARE = torch.arange(16.0).reshape(4, 4) - 7


@pytest.mark.parametrize(
    ("function", "kind", "expected"),
    [
        (lambda x: torch.softmax(x, -1), "dim", "dim: dim -1 -> 0"),
        (lambda x: x.permute(1, 0), "permutation", "permutation: dims [1, 0] -> [0, 1]"),
        (lambda x: x * 0.5, "number", "number: other 0.5 -> 0.505"),
        (lambda x: x * 0.5, "number", "number: other 0.5 -> -0.5"),
        (lambda x: x[1:3], "number", "number: start 1 -> 2"),
        (lambda x: x[1:3], "number", "number: end 3 -> 2"),
        (lambda x: x.sum(0, keepdim=True), "flag", "flag: keepdim True -> False"),
        (lambda x: x.reshape(2, 8), "size", "size: shape [2, 8] -> [8, 2]"),
        (lambda x: x.exp() * 3, "drop", "drop: replaced by input 0"),
        (lambda x: x - x.t(), "order", "order: operands 0 and 1 swapped"),
        (lambda x: torch.cat((x, -x), 1), "order", "order: list operand 0 reversed"),
        (lambda x: x.to(torch.bfloat16), "cast", "cast: dtype torch.bfloat16 -> torch.float16"),
        (lambda x: x + 1, "cast", "cast: result through torch.float16"),
        (lambda x: F.gelu(x, approximate="tanh"), "word", "word: approximate tanh -> none"),
        (lambda x: ops.rms_norm(x, None, 1e-6), "number", "number: eps 1e-06 -> 2e-06"),
        (lambda x: ops.rms_norm(x, x[0], 1e-6, 0.0), "number", "number: offset 0.0 -> 1.0"),
        (lambda x: ops.attention(x, x.t(), x), "flag", "flag: causal False -> True"),
        (lambda x: ops.attention(x, x.t(), x), "number", "number: scale None -> 0.3"),
        (lambda x: ops.attention(x, x.t(), x), "order", "order: operands 0 and 1 swapped"),
        (lambda x: x.tril(), "op", "op: tril.default -> triu.default"),
    ],
)
def test_this_mutant_is_made(function, kind, expected):
    graph, inputs = single(lambda x: function(x), SQUARE.clone())
    found = {text for text in described(graph, inputs, kind) if text.startswith(expected)}
    assert found, described(graph, inputs, kind)


def test_mutants_that_do_not_run_are_dropped_and_commutative_operands_are_not_swapped():
    graph, inputs = single(lambda x: x @ x[:, :3], SQUARE.clone())
    for mutant in mutants(graph, inputs):
        mutant.module(*inputs)
    assert not described(*single(lambda x: x.t() + x * x.t(), SQUARE.clone()), "order")
    assert "aten::sub" not in COMMUTATIVE


def test_inputs_are_not_changed_by_mutants_that_write():
    def write(x, i):
        y = x.clone()
        y.index_copy_(0, i, x[:2] * 3)
        return y

    graph, inputs = single(write, SQUARE.clone(), torch.tensor([0, 1]))
    list(mutants(graph, inputs))
    assert torch.equal(inputs[0], SQUARE)


def test_node_values_holds_every_node():
    graph, inputs = case()
    values = node_values(graph, inputs)
    assert set(values) == set(graph.graph.nodes)


@pytest.mark.parametrize(
    ("function", "names", "total"),
    [(attention, 30, 100), pytest.param(layer, 44, 300, marks=pytest.mark.slow)],
)
def test_respellings_mean_the_same(function, names, total):
    graph, inputs = case(function)
    before = graph.code
    kinds = collections.Counter()
    for spelling in respell(graph, inputs):
        name = spelling.description.split(" at ")[0]
        kinds[name] += 1
        assert spelling.module.code != before, spelling.description
        if kinds[name] <= 1 or names > 40:
            assert differential_fp64(graph, spelling.module, inputs) < 1e-12, spelling.description
    assert graph.code == before
    assert len(kinds) >= names
    assert sum(kinds.values()) >= total


@pytest.mark.parametrize(
    ("function", "name", "target"),
    [
        (lambda x: x.view(2, 8), "view as reshape", ATEN.reshape.default),
        (lambda x: x.t().reshape(2, 8), "reshape as contiguous view", ATEN.contiguous.default),
        (lambda x: x.transpose(0, 1), "transpose as permute", ATEN.permute.default),
        (lambda x: x.permute(1, 0), "permute as transpose", ATEN.transpose.int),
        (lambda x: x * 0.25, "multiplication as division", ATEN.div.Tensor),
        (lambda x: x / 8, "division as multiplication", ATEN.mul.Tensor),
        (lambda x: x * x, "product as square", ATEN.pow.Tensor_Scalar),
        (lambda x: x - x.t(), "subtraction as addition of the negative", ATEN.neg.default),
        (lambda x: torch.softmax(x, -1), "softmax spelled out", ATEN.amax.default),
        (lambda x: x[1:3], "slice as narrow", ATEN.narrow.default),
        (lambda x: F.linear(x, x, x[0]), "linear as product", ATEN.matmul.default),
    ],
)
def test_this_respelling_is_made(function, name, target):
    graph, inputs = single(lambda x: function(x), SQUARE.clone())
    found = [s for s in respell(graph, inputs) if s.description.startswith(name)]
    assert found
    for spelling in found:
        assert any(node.target == target for node in spelling.module.graph.nodes)
        assert differential_fp64(graph, spelling.module, inputs) < 1e-14
