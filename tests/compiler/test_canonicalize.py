"""The canonical form: equal spellings become equal graphs, every bit stays, and what may not go does not."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from tilewright.compiler.canonicalize import canonicalize
from tilewright.compiler.functionalize import functionalize
from tilewright.compiler.graph import op_name, placeholders, print_graph, structural_difference

aten = torch.ops.aten


def capture(fn, *inputs) -> fx.GraphModule:
    with torch.no_grad():
        return make_fx(fn, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


def bits(values) -> list:
    values = values if isinstance(values, list | tuple) else [values]
    return [(v.dtype, tuple(v.shape), v.contiguous().numpy().tobytes()) for v in values]


def normal(fn, *inputs, training: bool = False) -> fx.GraphModule:
    """The normal form of a function, checked to give the same bits, to be at rest and to keep its values."""
    expected = bits(fn(*[t.clone() for t in inputs]))
    gm = capture(fn, *inputs)
    functionalize(gm)
    canonicalize(gm, training=training)
    gm.graph.lint()
    assert bits(gm(*[t.clone() for t in inputs])) == expected, print_graph(gm.graph)
    assert canonicalize(gm, training=training) == {}
    assert all("val" in n.meta for n in gm.graph.nodes if n.op != "output")
    return gm


def ops(gm: fx.GraphModule) -> list[str]:
    return [op_name(n.target) for n in gm.graph.nodes if n.op == "call_function"]


X = torch.randn(3, 4, 6)
S = torch.randn(6, 6)

SPELLINGS = {
    "reshape": [
        lambda x: x.view(3, -1) * 2,
        lambda x: x.reshape(3, 24) * 2,
        lambda x: x.flatten(1) * 2,
        lambda x: x.flatten(-2, -1) * 2,
        lambda x: x.reshape(12, 6).view(3, 24) * 2,
        lambda x: x.contiguous().view(3, 4, 6).flatten(1) * 2,
        lambda x: torch.mul(x.unflatten(0, (1, 3)).view(3, 24), 2),
    ],
    "copying reshape": [
        lambda x: x.transpose(1, 2).reshape(3, 24) + 1,
        lambda x: x.permute(0, 2, 1).contiguous().view(3, -1) + 1,
        lambda x: x.mT.flatten(-2) + 1,
    ],
    "permute": [
        lambda x: x.transpose(0, 2) + 1,
        lambda x: x.permute(2, 1, 0) + 1,
        lambda x: x.permute(-1, -2, -3) + 1,
        lambda x: x.swapaxes(-1, 0) + 1,
        lambda x: x.movedim((0, 1, 2), (2, 1, 0)) + 1,
        lambda x: x.transpose(0, 1).transpose(0, 2).transpose(0, 1).transpose(0, 1).movedim(1, 2) + 1,
        lambda x: torch.ops.aten.numpy_T(x) + 1,
    ],
    "slice": [
        lambda x: x[:, 1:] * 3,
        lambda x: x[:, 1:4] * 3,
        lambda x: x[:, -3:] * 3,
        lambda x: x[:, 1:99, :] * 3,
        lambda x: x.narrow(1, 1, 3) * 3,
    ],
    "no-ops": [
        lambda x: torch.relu(x),
        lambda x: torch.relu(x.to(torch.float32).contiguous()),
        lambda x: torch.relu(torch.dropout(x, 0.5, False).type_as(x)),
        lambda x: torch.relu(x.float().clone().detach() * 1.0),
        lambda x: torch.relu(x[:].view(3, 4, 6).expand(3, -1, 6).permute(0, 1, 2)),
        lambda x: torch.relu(torch.dropout(x, 0.0, True) / 1 - 0),
        lambda x: torch.relu(torch.cat([torch.empty(0), x], 1)),
        lambda x: torch.relu(x.repeat(1, 1, 1)),
    ],
    "square": [
        lambda x: x * x,
        lambda x: x.pow(2),
        lambda x: x**2.0,
        lambda x: torch.square(x),
    ],
    "difference": [lambda x: x - x.sum(), lambda x: x + (-x.sum()), lambda x: -x.sum() + x],
    "cast": [
        lambda x: x.double(),
        lambda x: x.to(torch.float64),
        lambda x: torch.ops.aten._to_copy(x, dtype=torch.float64),
        lambda x: x.to(dtype=torch.float64, device="cpu", copy=False),
        lambda x: x.type_as(torch.empty(0, dtype=torch.float64)),
    ],
    "softmax": [lambda x: x.softmax(-1), lambda x: torch.softmax(x, dim=2)],
    "mean": [lambda x: x.mean(-1, keepdim=True), lambda x: torch.mean(x, [2], True)],
    "factory": [
        lambda x: torch.arange(6) + x,
        lambda x: torch.arange(0, 6) + x,
        lambda x: torch.arange(0, 6, 1, dtype=torch.int64, device="cpu") + x,
    ],
    "zeros": [
        lambda x: x.new_zeros(2, 6),
        lambda x: torch.zeros(2, 6),
        lambda x: torch.zeros((2, 6), device="cpu"),
    ],
    "interleave": [
        lambda x: torch.stack([x[..., ::2] + 1, x[..., 1::2]], -1).flatten(-2),
        lambda x: _interleaved(x),
    ],
    "parts": [lambda x: x.chunk(2, -1)[1] + 1, lambda x: x.split(3, 2)[1] + 1],
    "scalar": [lambda x: x * 0.5, lambda x: x * torch.scalar_tensor(0.5), lambda x: x * torch.full((), 0.5)],
}


def _interleaved(x):
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., ::2] + 1
    out[..., 1::2] = x[..., 1::2]
    return out


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_become_one_graph(name):
    first, *others = [normal(fn, X) for fn in SPELLINGS[name]]
    for other in others:
        difference = structural_difference(first, other)
        assert difference is None, f"{difference}\n{print_graph(first.graph)}\n\n{print_graph(other.graph)}"


MATRICES = {
    "linear": ([lambda x, w: x @ w.t(), lambda x, w: torch.matmul(x, w.mT), torch.nn.functional.linear], X),
    "mm": ([lambda x, w: torch.mm(x, w.t()), lambda x, w: x @ w.transpose(0, 1)], X[0]),
    "bmm": ([lambda x, w: torch.bmm(x, x.mT), lambda x, w: x @ x.transpose(-1, -2)], X),
    "addmm": ([lambda x, w: torch.addmm(w, x, w), lambda x, w: torch.addmm(w, x, w, beta=1, alpha=1)], S),
}


@pytest.mark.parametrize("name", MATRICES)
def test_products_become_one_graph(name):
    forms, x = MATRICES[name]
    first, *others = [normal(fn, x, S) for fn in forms]
    assert [structural_difference(first, o) for o in others] == [None] * len(others)


def test_addmm_with_a_weight_is_linear():
    gm = normal(lambda x, w, b: torch.addmm(b, x, w.t()), X[0], S, torch.randn(6))
    assert ops(gm) == ["linear"]
    gm = normal(lambda x, w, b: torch.addmm(b, x, w.t(), alpha=2), X[0], S, torch.randn(6))
    assert "addmm" in ops(gm)


KEPT = {
    "a returned copy": (lambda x: x.clone(), "clone"),
    "a returned view of a copy": (lambda x: x.clone()[0], "clone"),
    "the old value of a written input": (lambda x: (x.clone(), x.add_(1.0))[0], "clone"),
    "a float plus zero, which loses the sign of -0.0": (lambda x: torch.relu(x + 0), "add.Tensor"),
    "a product that casts": (lambda x: (x > 0) * 1 + 1, "mul.Tensor"),
    "a copy into another layout": (lambda x: x.mT.contiguous().sum(1), "clone"),
    "a permutation of equal sizes": (lambda x: x[:3, :3, :3].permute(1, 0, 2) + 1, "permute"),
    "a power of integers": (lambda x: torch.pow((x * 3).long(), 2), "pow.Tensor_Scalar"),
    "a square of booleans": (lambda x: (x > 0) * (x > 0), "mul.Tensor"),
    "a cast down and up": (lambda x: x.half().float(), "to.dtype"),
    "a strided slice": (lambda x: x[:, ::2] + 1, "slice.Tensor"),
    "a bias added after a product": (lambda x: x @ x[0, :, :].t() + x[0, 0, :4], "add.Tensor"),
    "a view of other bits": (lambda x: x.view(torch.int32) + 1, "view.dtype"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_computes_something_stays(name):
    fn, op = KEPT[name]
    assert op in ops(normal(fn, X))


def test_two_writes_are_never_swapped_by_dropping_their_copies():
    def fn(x, y):
        keep = x.clone()
        x.copy_(y)
        y.copy_(keep)
        return x + 1

    gm = capture(fn, torch.zeros(3), torch.ones(3))
    functionalize(gm)
    canonicalize(gm)
    x, y = torch.zeros(3), torch.ones(3)
    gm(x, y)
    assert torch.equal(x, torch.ones(3))
    assert torch.equal(y, torch.zeros(3))


def test_a_copy_of_memory_that_stays_in_place_is_kept():
    def fn(x):
        before = x.clone() + 0.5
        kept = x.clone()
        x.view(torch.int32).add_(1)
        return before, kept * 2

    gm = capture(fn, X.clone())
    assert functionalize(gm).refused
    canonicalize(gm)
    assert bits(gm(X.clone())) == bits(fn(X.clone()))
    assert ops(gm).count("clone") >= 1


def test_training_keeps_detach():
    fn = lambda x: torch.relu(x.detach() * 3)  # noqa: E731
    assert "detach" in ops(normal(fn, X, training=True))
    assert "detach" not in ops(normal(fn, X))


def test_random_dropout_is_kept():
    gm = capture(lambda x: torch.dropout(x, 0.5, True), X)
    canonicalize(gm)
    assert ops(gm) == ["dropout"]


def test_dynamic_sizes_are_respected():
    def fn(x):
        batch, length, _ = x.shape
        return x.view(batch, length, 2, -1).transpose(1, 2).reshape(batch, 2, -1)[:, :, 1:]

    gm = make_fx(fn, pre_dispatch=True, tracing_mode="symbolic")(X)
    canonicalize(gm)
    for x in (X, torch.randn(5, 7, 8), torch.randn(1, 2, 2)):
        assert torch.equal(gm(x), fn(x))


def test_source_metadata_is_kept():
    gm = make_fx(lambda x: x.transpose(0, 1).flatten() * 1.5, pre_dispatch=True, tracing_mode="fake")(X)
    for node in gm.graph.nodes:
        node.meta["stack_trace"] = "somewhere"
        node.meta["nn_module_stack"] = {"m": ("m", "M")}
    canonicalize(gm)
    assert all(n.meta["stack_trace"] == "somewhere" for n in gm.graph.nodes if n.op == "call_function")


class Region(torch.nn.Module):
    def forward(self, x):
        with torch.no_grad():
            y = torch.sin(x)
        with torch.autocast("cpu", enabled=False):
            z = torch.cos(y) + y
        return z * x


def test_regions_of_an_export_are_inlined():
    exported = torch.export.export(Region(), (X.requires_grad_(False),), strict=False)
    gm = fx.GraphModule(exported.graph_module, exported.graph)
    canonicalize(gm)
    assert ops(gm) == ["sin", "cos", "add.Tensor", "mul.Tensor"]
    assert torch.equal(gm(X)[0], Region()(X))


def dynamo_graph(model, args, kwargs):
    """The normal form of what a torch.compile backend gets, with the real inputs."""
    found = []

    def backend(gm, example_inputs, **_):
        context = torch._guards.TracingContext.get()

        def fake(t):
            known = context.tensor_to_context.get(t)
            source = known.tensor_source if known else None
            return context.fake_mode.from_tensor(t, symbolic_context=known, source=source, trace=False)

        with context.fake_mode, torch.fx.traceback.preserve_node_meta():
            run = torch.fx.Interpreter(gm).run
            flat = make_fx(
                lambda *a: run(*a), pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True
            )(*map(fake, example_inputs))
        found.append((flat, list(example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    flat, inputs = found[0]
    functionalize(flat)
    canonicalize(flat)
    return flat, inputs


def compare_frontends(model, args, kwargs, decompose: bool):
    left, tensors = dynamo_graph(model, args, kwargs)
    with torch.no_grad():
        exported = torch.export.export(model, args, kwargs, strict=False)
    exported = exported.run_decompositions({}) if decompose else exported
    right = fx.GraphModule(exported.graph_module, exported.graph)
    functionalize(right)
    canonicalize(right)
    held = {**exported.state_dict, **exported.constants}
    targets = {s.arg.name: s.target for s in exported.graph_signature.input_specs}
    by_memory, users = {}, []
    for node in placeholders(right.graph):
        target = targets[node.name]
        if target is None:
            users.append(node.name)
        else:
            by_memory[held[target].data_ptr(), tuple(held[target].shape)] = node.name
    given = dict(zip(users, torch.utils._pytree.tree_leaves((args, kwargs)), strict=True))
    inputs = {}
    for node, tensor in zip(placeholders(left.graph), tensors, strict=True):
        own = [name for name, value in given.items() if value is tensor]
        inputs[node.name] = own[0] if own else by_memory[tensor.data_ptr(), tuple(tensor.shape)]
    expected = left(*tensors)
    with torch.no_grad():
        original = model(*args, **kwargs)
    assert torch.equal(expected[0], original[0])
    return structural_difference(left, right, inputs), left


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=1, vocab_size=50, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), config


@pytest.mark.parametrize("decompose", [False, True])
def test_llama_reaches_one_form_from_both_frontends(llama, decompose):
    difference, _ = compare_frontends(llama[0], (torch.arange(7)[None],), {}, decompose)
    assert difference is None


def test_bert_reaches_one_form_from_both_frontends():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=32,
    )  # fmt: skip
    args = (torch.arange(7)[None], torch.tensor([[1, 1, 1, 1, 1, 0, 0]]))
    difference, _ = compare_frontends(transformers.BertModel(config).eval(), args, {}, decompose=False)
    assert difference is None


@pytest.mark.slow
@pytest.mark.parametrize("decompose", [False, True])
def test_wan_reaches_one_form_from_both_frontends(decompose):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    args = (torch.randn(1, 4, 3, 8, 8), torch.tensor([10]), torch.randn(1, 5, 16))
    difference, left = compare_frontends(model, args, {}, decompose)
    assert difference is None
    assert not {"empty_like", "slice_scatter"} & set(ops(left))


def test_static_cache_decode(llama):
    """One write-back per layer and tensor, and the cache read back through its new value."""
    transformers = pytest.importorskip("transformers")
    model, config = llama
    cache = transformers.StaticCache(config, max_cache_len=16)
    with torch.no_grad():
        model(torch.arange(5)[None], past_key_values=cache, use_cache=True)
    kept = {
        id(t): t.clone()
        for layer in cache.layers
        for t in (layer.keys, layer.values, layer.cumulative_length)
    }
    token = torch.tensor([[3]])
    gm, tensors = dynamo_graph(model, (token,), {"past_key_values": cache, "use_cache": True})
    before = [kept.get(id(t), t).clone() for t in tensors]
    names = [
        n.args[0].name for n in gm.graph.nodes if n.op == "call_function" and n.target is aten.copy_.default
    ]
    assert len(names) == len(set(names)) == 3
    assert ops(gm).count("index_copy") == 2
    results = gm(*before)
    after = {id(t): b for t, b in zip(tensors, before, strict=True)}
    for layer in cache.layers:  # the backend ran the Dynamo graph itself on the real cache
        assert torch.equal(after[id(layer.keys)], layer.keys)
        assert torch.equal(after[id(layer.values)], layer.values)
        assert int(after[id(layer.cumulative_length)]) == 6
    for layer in cache.layers:
        layer.keys.copy_(kept[id(layer.keys)])
        layer.values.copy_(kept[id(layer.values)])
        layer.cumulative_length.copy_(kept[id(layer.cumulative_length)])
    with torch.no_grad():
        expected = model(token, past_key_values=cache, use_cache=True).logits
    assert torch.allclose(results[-1], expected, rtol=0, atol=1e-5)
