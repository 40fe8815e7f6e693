"""Generated Triton compiled offline, and the text itself; test_triton_interpreter.py runs it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from tilewright.compiler.float_format import FloatFormat
from tilewright.kernels.common.family import KernelFamily
from tilewright.kernels.load import store_triton_source
from tilewright.kernels.table import FAMILIES, full_args
from tilewright.runtime.contracts import KernelKey, Refusal, Target
from tilewright.runtime.offline import Compiled, OfflineFailed, Resources, compile_offline, compile_whole
from tilewright.tools.offline_compile import Row, compile_row, default_keys

SM80 = Target("cuda", "sm_80")
PRODUCTS = (
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "block_sparse_attention_int8",
    "block_mass",
    "paged_attention",
    "token_attention",
    "packed_attention",
    "attention_mass",
)
"""Ops that hold tiles of matrix products, for which 128 registers are few."""


def generated() -> list[object]:
    """Ops with Triton sources; variants of another that take long to compile are slow."""
    ops = sorted(op for op in FAMILIES if FAMILIES[op].triton is not None)
    return [
        pytest.param(op, target, marks=[pytest.mark.slow] * op.endswith(("_backward", "_int8")))
        for op in ops
        for target in (SM80, Target("hip", "gfx942"))
        if target.arch in FAMILIES[op].archs
    ]


def compiled(family: KernelFamily, key: KernelKey, columns: int) -> Compiled:
    assert family.triton is not None
    name, text = family.source(key)
    return compile_whole(
        store_triton_source(name, text),
        name,
        dict(family.triton.parameters(key)),
        family.triton.constants(key, columns),
        key.target,
        **family.triton.launch_options(key, columns),
    )


@pytest.mark.parametrize(("op", "target"), generated(), ids=str)
def test_one_configuration_compiles_without_spilling(op: str, target: Target) -> None:
    key, columns = next(iter(default_keys(FAMILIES[op], target)))
    row = compile_row(FAMILIES[op], key, columns)
    assert row.complaint == ""
    most = 512 if target.kind == "hip" and op.endswith("_backward") else 255 if op in PRODUCTS else 128
    assert 8 <= row.used.registers <= most  # 4 warps of CDNA share 512 each


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_every_default_configuration_compiles(arch: str) -> None:
    for family in FAMILIES.values():
        for key, columns in default_keys(family, Target("cuda", arch)):
            assert compile_row(family, key, columns).complaint == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "said"), [("sm_90", "e4m3.e4m3"), ("sm_100", "kind::f8f6f4"), ("sm_120", "f32.e4m3.e4m3.f32")]
)
def test_scores_of_fp8_are_fp8_products(arch: str, said: str) -> None:
    family = FAMILIES["block_sparse_attention_fp8"]
    for key, columns in default_keys(family, Target("cuda", arch)):
        made = compiled(family, key, columns)
        assert said in made.text
        assert made.used.spill_bytes == 0


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("sm_80", "f32.f16.f16.f32"),
        ("sm_90", "cvt.rn.f16x2.e4m3x2"),
        ("sm_100", "cvt.rn.f16x2.e4m3x2"),
        ("sm_120", "f32.e4m3.e4m3.f32"),
    ],
)
def test_fp8_meets_the_units_that_there_are(arch: str, said: str) -> None:
    form, family, target = (
        FloatFormat("fp8-e4m3", activation="fp8-token"),
        FAMILIES["quantized_linear"],
        Target("cuda", arch),
    )
    packed = torch.empty(form.shape(64, 64), dtype=torch.uint8, device="meta")
    x = torch.empty(1, 64, dtype=torch.float16, device="meta")
    key = family.configure((x, packed, None, 64, form.text), target)
    assert isinstance(key, KernelKey)
    made = compiled(family, key, 64)
    assert said in made.text
    assert ("e4m3" in made.text) == (arch != "sm_80")
    assert made.used.spill_bytes == 0


def test_a_spill_and_too_much_shared_memory_are_complaints() -> None:
    assert Row("k", SM80, Resources(255, 8, 0, 0)).complaint == "spills"
    assert Row("k", Target("hip", "gfx942"), Resources(64, 0, 98304, 0)).complaint == "too much shared memory"
    assert Row("k", SM80, Resources(64, 0, 98304, 0)).complaint == ""


def test_a_real_spill_is_seen() -> None:
    """One warp cannot hold a row of 16384: 512 values a lane. The report must say so."""
    family = FAMILIES["add_rms_norm"]
    key, _ = next(iter(default_keys(family, SM80)))
    name, text = family.source(key)
    used = compile_offline(
        store_triton_source(name, text),
        name,
        dict(family.triton.parameters(key)),
        {"BLOCK": 16384},
        SM80,
        num_warps=1,
    )
    assert used.spill_bytes > 0


def test_errors_of_offline_compilation_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(OfflineFailed, match="sm_75 is not one of"):
        compile_offline(tmp_path / "a.py", "a", {}, {}, Target("cuda", "sm_75"))
    path = tmp_path / "tw_broken.py"
    path.write_text(
        "import triton\nimport triton.language as tl\n\n\n"
        "@triton.jit\ndef tw_broken(x):\n    tl.store(x, nothing)\n",
        encoding="utf-8",
    )
    with pytest.raises(OfflineFailed, match="nothing") as caught:
        compile_offline(path, "tw_broken", {"x": "*fp32"}, {}, SM80)
    assert "\n" not in str(caught.value)


def _text(op: str, *args: object) -> str:
    key = FAMILIES[op].configure(full_args(op, args), SM80)
    assert isinstance(key, KernelKey)
    return FAMILIES[op].source(key)[1]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_what_is_off_is_absent_from_the_text() -> None:
    plain = _text("rms_norm", meta(4, 64), None, 1e-6)
    ast.parse(plain)
    assert "weight" not in plain
    assert "residual" not in plain
    assert "offset" not in plain
    full = _text("add_rms_norm", meta(4, 64), meta(4, 64), meta(64), 1e-6, 1.0)
    assert full.count("tl.load") == 3
    assert full.count("tl.store") == 2
    one = _text("linear", meta(1, 64), meta(5, 64))
    assert "M <" not in one
    assert "sum1" not in one


def test_rows_that_do_not_fit_a_program_are_refused() -> None:
    refused = FAMILIES["rms_norm"].configure(full_args("rms_norm", (meta(2, 20000), None, 1e-6)), SM80)
    assert isinstance(refused, Refusal)
    assert "20000" in refused.reason
