"""The ops around the kernels: selection with reasons, fakes, gradients, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tilewright.compiler.block_layout import BlockLayout
from tilewright.compiler.diagnostics import LoweringError
from tilewright.compiler.ops import all_ops
from tilewright.compiler.weight_format import WeightFormat
from tilewright.kernels.common.abi import HEADER, TORCH_ABI
from tilewright.kernels.common.family import config_of
from tilewright.kernels.linear import family as linear_family
from tilewright.kernels.table import (
    FAMILIES,
    KernelChoice,
    candidates,
    full_args,
    host_target,
    list_kernels,
    select_for_node,
    too_small,
)
from tilewright.runtime.build import LIBRARY, CompileFailed, compile_cpp
from tilewright.runtime.contracts import Refusal, Target

TARGET = host_target()
AVX2 = Target("cpu", "avx2")
INT4 = WeightFormat(4, 32, "float-zero")
needs_kernels = pytest.mark.skipif(TARGET.arch == "generic", reason="kernels need AVX2")


def _cases() -> dict[str, tuple[Any, ...]]:
    torch.manual_seed(3)
    x, weights = torch.randn(1, 67), [torch.randn(n, 67) for n in (5, 3)]
    heads = [torch.randn(1, h, 300, 16) for h in (4, 2, 2)]
    packed = [INT4.pack(INT4.quantizer().quantize(w)) for w in weights]
    return {
        "rms_norm": (torch.randn(5, 67), torch.randn(67), 1e-6),
        "add_rms_norm": (torch.randn(5, 67), torch.randn(5, 67), torch.randn(67), 1e-6),
        "gated_mlp": (torch.randn(5, 67), torch.randn(5, 67), "silu"),
        "linear": (x, weights[0]),
        "linear_multi": (x, weights, [None, None]),
        "quantized_linear": (x, packed[0], torch.randn(5), 5, INT4.text),
        "quantized_linear_multi": (x, packed, [None, torch.randn(3)], [5, 3], INT4.text),
        "block_sparse_attention": (*heads, *BlockLayout.causal(300, 300, 4, window=90).arguments()),
    }


def as_list(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def with_grad(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone().requires_grad_() if value.is_floating_point() else value
    return [with_grad(v) for v in value] if isinstance(value, list) else value


def leaves(args: Any) -> list[torch.Tensor]:
    found = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
    return [t for t in found if t.is_floating_point()]


def choose(op: str, args: tuple[Any, ...], training: bool = False) -> KernelChoice:
    found = select_for_node(op, args, TARGET, training=training)
    assert isinstance(found, KernelChoice), str(found)
    return found


@needs_kernels
@pytest.mark.parametrize("op", sorted(_cases()))
def test_opcheck(op: str) -> None:
    args = _cases()[op]
    for training in (False, True):
        choice = choose(op, args, training)
        given, _ = choice.rewrite_args(with_grad(list(args)) if training else args)
        tests = ("test_schema", "test_faketensor") + (("test_autograd_registration",) if training else ())
        torch.library.opcheck(choice.op, given, test_utils=tests)


@needs_kernels
@pytest.mark.parametrize("op", sorted(_cases()))
def test_gradients_are_those_of_the_definition(op: str) -> None:
    args = with_grad(list(_cases()[op]))
    choice = choose(op, tuple(args), training=True)
    given, _ = choice.rewrite_args(args)
    got = as_list(choice.op(*given))
    want = as_list(all_ops()[op].definition(*full_args(op, args)))
    seeds = [torch.randn_like(w) for w in want]
    mine = torch.autograd.grad(got, leaves(args), seeds)
    theirs = torch.autograd.grad(want, leaves(args), seeds)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@needs_kernels
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "sigmoid"])
def test_gradients_of_the_other_activations(activation: str) -> None:
    """The formulas alone: they do not depend on the kernel."""
    family = FAMILIES["gated_mlp"]
    gate, up, dy = (
        torch.randn(3, 9, requires_grad=True),
        torch.randn(3, 9, requires_grad=True),
        torch.randn(3, 9),
    )
    key = choose("gated_mlp", (gate, up, activation)).key

    class Context:
        saved_tensors = (gate, up)

    want = torch.autograd.grad(all_ops()["gated_mlp"].definition(gate, up, activation), (gate, up), dy)
    for mine, theirs in zip(family.backward(key)(Context, dy), want, strict=True):
        torch.testing.assert_close(mine, theirs)


@needs_kernels
@pytest.mark.parametrize("op", ["add_rms_norm", "linear_multi"])
def test_compiles_whole(op: str) -> None:
    args = _cases()[op]
    choice = choose(op, args)
    given, _ = choice.rewrite_args(args)
    kernel = choice.op

    def model(*inputs: Any) -> Any:
        first, second = kernel(*inputs)
        return torch.relu(first).sum() + second * 2

    torch._dynamo.reset()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(got, model(*given))


@needs_kernels
def test_compiles_with_inductor_and_trains() -> None:
    x, residual, weight = (with_grad(a) for a in _cases()["add_rms_norm"][:3])
    kernel = choose("add_rms_norm", (x, residual, weight, 1e-6), training=True).op

    def model(x: Any, residual: Any, weight: Any) -> Any:
        y, total = kernel(x, residual, weight, 1e-6)
        return (y * total.sigmoid()).sum()

    torch._dynamo.reset()
    mine = torch.autograd.grad(
        torch.compile(model, fullgraph=True)(x, residual, weight), (x, residual, weight)
    )
    theirs = torch.autograd.grad(model(x, residual, weight), (x, residual, weight))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def refusal(op: str, *args: Any, target: Target = AVX2) -> str:
    found = select_for_node(op, args, target, training=False)
    assert isinstance(found, Refusal)
    return found.reason


def test_refusals_name_the_value() -> None:
    x = torch.randn(2, 64)
    assert "65 rows" in refusal("linear", torch.randn(65, 64), torch.randn(5, 64))
    assert "float64" in refusal("linear", x.double(), torch.randn(5, 64).double())
    assert "strides (1, 5)" in refusal("linear", x, torch.randn(64, 5).t())
    assert "weight 1 is" in refusal("linear_multi", x, [torch.randn(5, 64), torch.randn(5, 63)], [None, None])
    assert "1 weights" in refusal("linear_multi", x, [torch.randn(5, 64)], [None])
    assert "'tanh'" in refusal("gated_mlp", x, x, "tanh")
    assert "[1, 64]" in refusal("gated_mlp", x, x[:1], "silu")
    assert "no axes" in refusal("rms_norm", torch.tensor(1.0), None, 1e-6)
    assert "cpu:generic" in refusal("rms_norm", x, None, 1e-6, target=Target("cpu", "generic"))
    assert "is on cpu" in refusal("rms_norm", x, None, 1e-6, target=Target("cuda", "sm_90"))
    assert "no kernel is generated" in refusal("layer_norm", x, [64])


def test_a_symbolic_number_of_rows_is_refused_for_linear_only() -> None:
    class Double(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    program = torch.export.export(
        Double(), (torch.randn(3, 64),), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}}
    )
    x = next(node.meta["val"] for node in program.graph.nodes if node.op == "placeholder")
    assert isinstance(x.shape[0], torch.SymInt)
    assert "not known when compiling" in refusal("linear", x, torch.randn(5, 64))
    for op, args in (("gated_mlp", (x, x, "silu")), ("add_rms_norm", (x, x, None, 1e-6))):
        assert isinstance(select_for_node(op, args, AVX2, training=False), KernelChoice)


@pytest.mark.parametrize("narrow", [False, True])
def test_many_rows_go_to_the_library_that_fills_the_vector(
    monkeypatch: pytest.MonkeyPatch, narrow: bool
) -> None:
    monkeypatch.setattr(linear_family, "library_is_narrow", lambda: narrow)
    x, weight, bias = torch.randn(65, 64), torch.randn(5, 64), torch.randn(5)
    avx512 = Target("cpu", "avx512")
    found = select_for_node("linear", (x, weight, bias), avx512, training=False)
    if not narrow:
        assert isinstance(found, Refusal)
        assert "65 rows" in found.reason
        return
    assert isinstance(found, KernelChoice)
    assert found.family.needs_torch(found.key)
    few = select_for_node("linear", (x[:8], weight, bias), avx512, training=False)
    assert isinstance(few, KernelChoice)
    assert config_of(few.key)["rows"] == 8
    assert not few.family.needs_torch(few.key)
    for args in (
        (x.bfloat16(), weight.bfloat16(), bias.bfloat16()),
        (x, torch.randn(5, 100)[:, :64], bias),
        (x, weight, torch.randn(10)[::2]),
    ):
        assert "65 rows" in refusal("linear", *args, target=avx512)
    assert "65 rows" in refusal("linear", x, weight, bias)


def test_small_elementwise_work_is_left_to_fusion() -> None:
    x = torch.empty(1, 576, device="meta")
    assert "576 elements" in str(too_small("add_rms_norm", (x, x, None, 1e-6), AVX2))
    assert too_small("add_rms_norm", (torch.empty(64, 576, device="meta"),), AVX2) is None
    assert too_small("linear", (x,), AVX2) is None
    assert too_small("gated_mlp", (x, x, "silu"), Target("cuda", "sm_90")) is None


def test_the_table_lists_every_family_for_every_kind_of_target() -> None:
    assert {row["op"] for row in list_kernels()} == set(FAMILIES)
    assert len(list_kernels()) == sum(len(f.generate) for f in FAMILIES.values())
    assert all(row["legality"] and row["dtypes"] for row in list_kernels())
    assert candidates("layer_norm") == []
    with pytest.raises(LoweringError, match="did you mean 'rms_norm'"):
        candidates("rmsnorm")


@pytest.mark.parametrize("op", sorted(_cases()))
@pytest.mark.parametrize("arch", ["avx2", "avx512"])
def test_source_is_deterministic_and_named_by_its_text(op: str, arch: str) -> None:
    family = FAMILIES[op]
    key = family.configure(full_args(op, _cases()[op]), Target("cpu", arch))
    assert not isinstance(key, Refusal)
    name, text = family.source(key)
    assert family.source(key) == (name, text)
    assert name.startswith(f"{op}_")
    assert name in text
    assert "off" not in name
    assert ("_mm512" in text) == (arch == "avx512")
    assert ("bf16" in text) is False


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", sorted(_cases()))
def test_avx512_source_compiles(op: str, dtype: torch.dtype) -> None:
    """This machine may lack AVX-512: the text is compiled, not run."""

    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        return [cast(v) for v in value] if isinstance(value, list) else value

    args = [cast(a) for a in _cases()[op]]
    for activation in ("silu", "gelu") if op == "gated_mlp" else ("",):
        key = FAMILIES[op].configure(
            full_args(op, [activation or a if isinstance(a, str) else a for a in args]),
            Target("cpu", "avx512"),
        )
        assert not isinstance(key, Refusal)
        folder = compile_cpp(FAMILIES[op].source(key)[1], "avx512", {HEADER: TORCH_ABI})
        assert (folder / LIBRARY).stat().st_size > 0


def test_build_refuses_what_it_does_not_know() -> None:
    with pytest.raises(CompileFailed, match="arch 'native; rm' is not one of avx2, avx512"):
        compile_cpp("int x;", "native; rm", {})
