"""Chained decode functions against the ops' definitions in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import tilewright.compiler.ops  # noqa: F401  (registers the semantic ops)
from tilewright.compiler.float_format import FloatFormat, parse_format
from tilewright.compiler.repeats import sink_writes
from tilewright.compiler.weight_format import WeightFormat
from tilewright.kernels.chain import cpp
from tilewright.kernels.chain.build import build, refusal
from tilewright.kernels.chain.plan import Plan, plan
from tilewright.kernels.table import host_target
from tilewright.runtime.contracts import Refusal

tw = torch.ops.tilewright
needs_host = pytest.mark.skipif(refusal(host_target()) is not None, reason="no chains on this processor")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _planned(f: Callable[..., Any], inputs: list[Tensor]) -> Plan | Refusal:
    graph = make_fx(f, tracing_mode="fake", pre_dispatch=True)(*inputs).graph
    sink_writes(graph)
    calls = [n for n in graph.nodes if n.op == "call_function"]
    given = [n for n in graph.nodes if n.op == "placeholder"]
    out: Any = next(n for n in graph.nodes if n.op == "output").args[0]
    outputs = [out] if isinstance(out, fx.Node) else list(out)
    return plan(calls, given, outputs)


def _check(f: Callable[..., Any], inputs: list[Tensor], bound: float = 3e-6) -> str:
    """Run f as a chain and in float64 and compare results and state; returns the generated source."""
    made = _planned(f, inputs)
    assert isinstance(made, Plan), made
    op, path = build(made, host_target())
    wide = [t.double() if t.is_floating_point() else t.clone() for t in inputs]
    want = f(*wide)
    got_inputs = [t.clone() for t in inputs]
    got = op(*got_inputs)
    pairs = zip(_many(got) + got_inputs, _many(want) + wide, strict=True)
    for a, b in pairs:
        assert a.shape == b.shape
        scale = b.double().abs().max().item() if b.numel() else 0.0
        assert (a.double() - b.double()).abs().max().item() <= bound * max(scale, 1.0)
    return path.read_text()


def _many(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _block(heads: int, group: int, width: int, mask: str, bias: bool) -> Callable[..., Any]:
    """One decoder block of one token with a cache; arguments as `_inputs` makes them."""

    def block(x, gain, gain2, wq, wk, wv, bq, wo, wg, wu, wd, cos, sin, length, one, keys, values, *masks):  # type: ignore[no-untyped-def]
        normed = tw.rms_norm(x, gain, 1e-5)
        q, k, v = tw.linear_multi(normed, [wq, wk, wv], [bq if bias else None, None, None])
        q = q.view(1, 1, heads * group, width).transpose(1, 2)
        k = k.view(1, 1, heads, width).transpose(1, 2)
        v = v.view(1, 1, heads, -1).transpose(1, 2)
        q, k = tw.rope(q, cos, sin), tw.rope(k, cos, sin)
        at = one + length
        new_keys = tw.kv_update(keys, k, at, 2)
        new_values = tw.kv_update(values, v, at, 2)
        grouped = q.view(1, heads, group, width)
        out = tw.attention(grouped, new_keys, new_values, masks[0] if masks else None, 0.3)
        out = out.view(1, heads * group, 1, -1).transpose(1, 2).reshape(1, 1, -1)
        normed, total = tw.add_rms_norm(tw.linear(out, wo), x, gain2, 1e-5, 1.0)
        gate, up = tw.linear_multi(normed, [wg, wu], [None, None])
        result = total + tw.linear(tw.gated_mlp(gate, up, "silu"), wd)
        length.copy_(length + 1)
        keys.copy_(new_keys)
        values.copy_(new_values)
        return result, total

    return block


def _inputs(
    heads: int, group: int, width: int, value_width: int, length: int, at: int, mask: str, d: int, hidden: int
) -> list[Tensor]:
    def weight(n: int, k: int) -> Tensor:
        return torch.randn(n, k) * k**-0.5

    queries = heads * group
    made = [torch.randn(1, 1, d), torch.rand(d) + 0.5, torch.randn(d)]
    made += [weight(queries * width, d), weight(heads * width, d), weight(heads * value_width, d)]
    made += [torch.randn(queries * width), weight(d, queries * value_width)]
    made += [weight(hidden, d), weight(hidden, d), weight(d, hidden)]
    angle = torch.rand(1, 1, 1, width)
    made += [angle.cos(), angle.sin(), torch.tensor(at), torch.zeros(1, dtype=torch.int64)]
    made += [torch.randn(1, heads, length, width), torch.randn(1, heads, length, value_width)]
    seen = torch.arange(length) <= at
    if mask == "bool":
        seen[at // 2] = False
        made.append(seen.view(1, 1, 1, length))
    elif mask == "float":
        bias = torch.randn(length).masked_fill(~seen, float("-inf"))
        made.append(bias.view(1, 1, 1, length))
    elif mask == "shut":
        made.append(torch.zeros(1, 1, 1, length, dtype=torch.bool))
    return made


CASES = {
    "llama": dict(
        heads=3, group=3, width=64, value_width=64, length=40, at=17, mask="bool", d=72, hidden=120
    ),
    "odd sizes, float mask": dict(
        heads=2, group=5, width=24, value_width=40, length=29, at=28, mask="float", d=37, hidden=33
    ),
    "no mask": dict(heads=1, group=1, width=8, value_width=8, length=5, at=0, mask="none", d=16, hidden=8),
    "nothing to attend to": dict(
        heads=2, group=2, width=16, value_width=16, length=9, at=3, mask="shut", d=20, hidden=12
    ),
}


@needs_host
@pytest.mark.parametrize("name", CASES)
def test_decoder_block(name: str) -> None:
    case = CASES[name]
    inputs = _inputs(**case)  # type: ignore[arg-type]
    f = _block(case["heads"], case["group"], case["width"], case["mask"], bias=True)  # type: ignore[arg-type]
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        text = _check(f, inputs)
    assert "share.low(to - from)" in text
    assert ("!in" in text) == (case["mask"] in ("bool", "shut"))


@needs_host
def test_repeated_calls_advance_the_state() -> None:
    case = CASES["llama"]
    inputs = _inputs(**case)  # type: ignore[arg-type]
    f = _block(3, 3, 64, "bool", bias=False)
    made = _planned(f, inputs)
    assert isinstance(made, Plan)
    op, _ = build(made, host_target())
    ours, theirs = [t.clone() for t in inputs], [t.clone() for t in inputs]
    for _ in range(4):
        got, want = op(*ours), f(*theirs)
        torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    assert ours[13].item() == theirs[13].item() == case["at"] + 4  # type: ignore[operator]
    torch.testing.assert_close(ours[15], theirs[15], rtol=1e-4, atol=1e-5)


@needs_host
def test_elementwise_and_norm_stages() -> None:
    def f(x: Tensor, w: Tensor, b: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        y = tw.linear(x, w, b)
        normed = tw.layer_norm(y, [w.shape[0]], gain, shift)
        act = torch.relu(normed) * torch.sigmoid(y) + torch.nn.functional.silu(y * 0.5)
        heads = tw.rms_norm(act.view(1, 1, 3, -1), None, 1e-6)
        return heads, y + 1.0, tw.gated_mlp(act, y, "gelu"), tw.gated_mlp(y, act, "gelu_tanh")

    inputs = [torch.randn(1, 1, 50), torch.randn(39, 50), *(torch.randn(39) for _ in range(3))]
    torch.set_num_threads(3)
    _check(f, inputs, bound=2e-6)


@needs_host
def test_position_outside_of_the_cache_is_refused() -> None:
    inputs = _inputs(**CASES["llama"])  # type: ignore[arg-type]
    made = _planned(_block(3, 3, 64, "bool", bias=False), inputs)
    assert isinstance(made, Plan)
    op, _ = build(made, host_target())
    inputs[13].fill_(40)
    before = inputs[15].clone()
    with pytest.raises(RuntimeError, match="position lies outside"):
        op(*inputs)
    assert torch.equal(before, inputs[15])
    with pytest.raises(RuntimeError, match="another dtype, size or layout"):
        op(inputs[0][..., :-1], *inputs[1:])


def _refused(f: Callable[..., Any], *inputs: Tensor) -> str:
    made = _planned(f, list(inputs))
    assert isinstance(made, Refusal), made
    return made.reason


def test_what_is_not_supported_is_named() -> None:
    x, w = torch.randn(1, 1, 8), torch.randn(4, 8)
    assert "x has 16 elements" in _refused(lambda a, b: tw.linear(a, b), torch.randn(2, 8), w)
    assert "no stage" in _refused(lambda a: torch.sin(a), x)
    assert "float32" in _refused(lambda a, b: tw.linear(a, b), x.half(), w.half())
    assert "broadcasts" in _refused(lambda a, b: a + b, x, torch.randn(1))
    assert "reorders" in _refused(lambda a: a.view(2, 4).transpose(0, 1), x)
    cache, at = torch.randn(1, 2, 6, 8), torch.zeros(1, dtype=torch.int64)
    assert "written back" in _refused(
        lambda c, n, p: tw.kv_update(c, n, p, 2), cache, torch.randn(1, 2, 1, 8), at
    )
    q = torch.randn(1, 2, 1, 8)
    assert "causal" in _refused(lambda a, k, v: tw.attention(a, k, v, None, None, True), q, cache, cache)
    assert "mask" in _refused(
        lambda a, k, v, m: tw.attention(a, k, v, m), q, cache, cache, torch.ones(1, 2, 1, 6).bool()
    )


def test_old_state_and_returned_state_are_refused() -> None:
    cache, new, at = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 1, 8), torch.zeros(1, dtype=torch.int64)

    def reads_old(c: Tensor, n: Tensor, p: Tensor) -> Tensor:
        updated = tw.kv_update(c, n, p, 2)
        both = tw.attention(n, updated, c)
        c.copy_(updated)
        return both

    assert "as it was before" in _refused(reads_old, cache, new, at)

    def returns_state(c: Tensor, n: Tensor, p: Tensor) -> Tensor:
        return c.copy_(tw.kv_update(c, n, p, 2))

    assert "leaves the stretch" in _refused(returns_state, cache, new, at)


def test_sources_of_equal_plans_are_equal_and_of_others_not() -> None:
    inputs = _inputs(**CASES["llama"])  # type: ignore[arg-type]
    plans = [_planned(_block(3, 3, 64, "bool", bias), inputs) for bias in (True, False, False)]
    names = [cpp.source(p, "avx2")[0] for p in plans if isinstance(p, Plan)]
    assert len(names) == 3
    assert names[1] == names[2] != names[0]


def test_wide_registers_from_the_same_generator() -> None:
    made = _planned(_block(3, 3, 64, "bool", bias=True), _inputs(**CASES["llama"]))  # type: ignore[arg-type]
    assert isinstance(made, Plan)
    _, text = cpp.source(made, "avx512")
    assert "_mm512_fmadd_ps" in text
    assert "__m256 " not in text


FORMATS = (
    "int4.32.symmetric.int8-group.blocks8",
    "int8.0.symmetric.int8-token.blocks8",
    "int4.32.float-zero.none.blocks8",
    "int3.64.float-zero.int8-token.blocks8",
    "int8.0.symmetric.int4-token.blocks8",
    "int8.0.symmetric.int8-static.blocks8",
    "int4.64.float-zero.int8-static.blocks8",
    "fp8-e4m3.0.none.rows",
    "fp8-e5m2.tensor.fp8-token.rows",
    "fp8-e4m3.32.fp8-token.rows",
    "nvfp4.16.none.rows",
)


@needs_host
@pytest.mark.parametrize("text", FORMATS)
def test_quantized_linear_stages(text: str) -> None:
    form, columns = parse_format(text), 160 if text.startswith(("nvfp4", "fp8-e4m3.32")) else 150

    def packed(rows: int) -> Tensor:
        weight = form.pack_weight(torch.randn(rows, columns))
        if isinstance(form, FloatFormat) or not form.has_step:
            return weight
        return form.with_step(weight, rows / 3000)  # each its own; the smaller cuts what lies beyond 1.9

    def f(x: Tensor, a: Tensor, b: Tensor, bias: Tensor, plain: Tensor) -> tuple[Tensor, ...]:
        first, second = tw.quantized_linear_multi(x, [a, b], [None, bias], [45, 67], text)
        return first, second, tw.quantized_linear(x, a, None, 45, text) + tw.linear(x, plain)

    plain = torch.randn(45, columns)
    inputs = [torch.randn(1, 1, columns), packed(45), packed(67), torch.randn(67), plain]
    made = _planned(f, inputs)
    assert isinstance(made, Plan), made
    op, path = build(made, host_target())
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(op(*inputs), f(*inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    own = isinstance(form, WeightFormat) and form.has_step  # a row is made ready for every step
    assert path.read_text().count("prepare_row(in0") == (2 if own else 1)


@needs_host
@pytest.mark.parametrize("name", CASES)
def test_attention_beside_packed_weights(name: str) -> None:
    """Packed weights are read by vectors of 8, keys and values by the widest of the processor."""
    text = "int4.32.float-zero.none.blocks8"
    form, case = parse_format(text), CASES[name]
    columns = int(case["d"])  # type: ignore[call-overload]
    block = _block(case["heads"], case["group"], case["width"], str(case["mask"]), bias=True)  # type: ignore[arg-type]

    def f(packed: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        result, total = block(*given)
        return total, tw.quantized_linear(result, packed, None, 45, text)

    inputs = [form.pack_weight(torch.randn(45, columns)), *_inputs(**case)]  # type: ignore[arg-type]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found = _check(f, inputs, bound=1e-5)
    assert ("namespace wide" in found) == (host_target().arch == "avx512")
