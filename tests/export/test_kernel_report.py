"""Static analysis of GPU code, against code whose content is known."""

import re

import pytest

from tilewright.compiler.devices import device_named
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cli import build_parser
from tilewright.frontends.commands import kernels
from tilewright.frontends.kernel_report import (
    _amd_code,
    _inner_loop,
    kernel_rows,
    plain_flash_rows,
    predict,
)


def test_the_inner_loop_is_the_shortest_with_tensor_core_work() -> None:
    text = """
.LBB0_1:
    s_mov_b32 s0, s1
.LBB0_2:
    v_mfma_f32_16x16x16_f16 a, b, c
    ds_read_b128 v0, v1
    v_add_f32 v0, v1, v2
    s_cbranch_scc1 .LBB0_2
.LBB0_3:
    v_add_f32 v0, v1, v2   ; a loop without tensor-core work
    s_cbranch_scc1 .LBB0_3
    s_branch .LBB0_1
    .section .text
"""
    loop = _inner_loop(_amd_code(text), re.compile("v_mfma"))
    assert loop == ["v_mfma_f32_16x16x16_f16", "ds_read_b128", "v_add_f32", "s_cbranch_scc1"]


def test_attention_beside_a_plain_flash_kernel() -> None:
    (plain,) = plain_flash_rows(["sm_80"])
    rows = [r for r in kernel_rows(["block_sparse_attention"], ["sm_80"]) if "float16 head=64" in r["kernel"]]
    assert len(rows) >= 1
    for row in rows:
        # 128 x 64 tiles, heads of 64, 8 warps: (16x16x2 products of 16x8x16) / 8 warps = 64 HMMA a step
        for found in (plain, row):
            assert found["tensor_core_share"] * found["loop_instructions"] == pytest.approx(64, abs=0.5)
        assert row["spill_bytes"] == 0
        assert row["tensor_core_share"] > 0.95 * plain["tensor_core_share"]
        assert 0 < row["roofline"]["bytes_per_flop"] < 0.05
        assert row["kernel"].endswith(" 128x64")


def test_roofline_by_hand() -> None:
    found = predict(312e12 * 1e-3, 1.0, "float16", "sm_80")  # one millisecond at the dense peak
    assert found.microseconds == pytest.approx(1000 + 3)
    assert found.bound == "arithmetic"
    found = predict(1.0, 2039e9 * 1e-3, "float16", "sm_80")
    assert found.microseconds == pytest.approx(1000 + 3)
    assert found.bound == "memory"


@pytest.mark.parametrize(
    ("arch", "peak", "bandwidth"), [("sm_89", 362.05e12, 864e9), ("gfx950", 2516.6e12, 8e12)]
)
def test_devices_whose_configurations_are_borrowed_have_rooflines(
    arch: str, peak: float, bandwidth: float
) -> None:
    launch = device_named(arch).launch_us
    assert predict(1e-3 * peak, 1.0, "float16", arch).microseconds == pytest.approx(1000 + launch)
    assert predict(1.0, 1e-3 * bandwidth, "float16", arch).microseconds == pytest.approx(1000 + launch)
    assert all("roofline" in row for row in kernel_rows(["rms_norm"], [arch]))


def test_the_command_refuses_unknown_names() -> None:
    cases = ((["report", "nothing"], "no kernel of op"), (["report", "--target", "sm_1"], "sm_1"))
    for words, match in cases:
        with pytest.raises(OptionError, match=match):
            kernels.run(build_parser().parse_args(["kernels", *words]))
