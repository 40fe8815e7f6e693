"""FlexAttention's kernel as rendered from PyTorch's template: right, and read beside ours."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tilewright.frontends import flex_template
from tilewright.frontends.commands import kernels
from tilewright.frontends.flex_template import NAME, NoTemplate, flex_kernel
from tilewright.frontends.kernel_report import flex_rows, kernel_rows, notes


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89"])
def test_its_inner_loop_is_that_of_its_tile(arch: str) -> None:
    (row,) = flex_rows([arch])
    assert "128x64" in row["kernel"]
    assert row["warps"] == 4
    # (16 x 16 x 2 products of 16x8x16) / 4 warps = 128 HMMA a step
    assert row["tensor_core_share"] * row["loop_instructions"] == pytest.approx(128, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "neighbour"), [("sm_89", "sm_120"), ("gfx950", "gfx942")])
def test_borrowed_configurations_are_said(arch: str, neighbour: str) -> None:
    rows = list(kernel_rows(["rms_norm"], [arch]))
    assert rows
    assert all(row["configuration"] == neighbour for row in rows)
    assert any(arch in text and neighbour in text for text in notes([arch]))
    assert f"configuration of {neighbour}" in kernels._line(rows[0])
    own = next(kernel_rows(["rms_norm"], [neighbour]))
    assert "configuration of" not in kernels._line(own)


@pytest.mark.slow  # Inductor's lowering of FlexAttention takes seconds to import
def test_a_device_without_a_tile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert notes(["sm_80"]) == []
    monkeypatch.setitem(flex_template._TABLES, "sm_80", ("CUDAConfigHeuristic", "absent"))
    with pytest.raises(NoTemplate, match="sm_80"):
        flex_kernel("sm_80")
    assert list(flex_rows(["sm_80"])) == []
    assert "FlexAttention has no row" in notes(["sm_80"])[0]


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_it_computes_attention_over_the_listed_blocks(tmp_path: Path) -> None:
    from tilewright.runtime.offline import import_source

    kernel = flex_kernel("sm_80", heads=2, tokens=256)
    (tmp_path / "flex.py").write_text(kernel.text)
    run = getattr(import_source(tmp_path / "flex.py", f"{NAME}_256"), NAME)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 256, 64).half() * 2 for _ in range(3))
    out, lse = torch.zeros_like(q), torch.zeros(1, 2, 256)
    partial, full = torch.tensor([[[1, 0]]]).int(), torch.tensor([[[1, 1]]]).int()
    listed, whole = torch.tensor([[[[0, 0], [0, 0]]]]).int(), torch.tensor([[[[1, 0], [0, 0]]]]).int()
    run[(256 // kernel.rows, 1, 2)](q, k, v, lse, lse.clone(), partial, listed, full, whole, out)
    mask = torch.ones(256, 256, dtype=torch.bool)
    mask[128:, 128:] = False  # the second row lists one block
    scores = (q.double() @ k.double().mT / 8).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ v.double(), rtol=1e-2, atol=5e-3)
    torch.testing.assert_close(lse.double() * 0.6931471805599453, scores.logsumexp(-1), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(out, F.scaled_dot_product_attention(q, k, v), atol=5e-3)
