"""An attention that a GPU loads by tensor descriptors, exported for launchers in C, which make none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright.frontends.export import kernels_export
from tilewright.runtime.contracts import Target


class Attention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.slow
@pytest.mark.parametrize("scores", ["", ",quantize-attention", ",quantize-attention{scores=fp8}"])
def test_exported_attention_takes_pointers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: str
) -> None:
    monkeypatch.setattr(kernels_export, "GPU_TARGETS", (Target("cuda", "sm_90"),))
    q = torch.randn(1, 2, 96, 32).bfloat16()
    manifest = tw.export(
        Attention(),
        (q, q, q),
        f"adaptive-block-attention{{block=16,sparsity=0.5}}{scores}",
        tmp_path / "out",
        "kernels",
        facts={"video_grid": (4, 4, 6)},
    )
    kind = "_fp8" if "fp8" in scores else "_int8" if scores else ""
    op = f"block_sparse_attention{kind}"
    rows = [row for row in manifest["kernels"] if (row["op"], row["target"]) == (op, "cuda:sm_90")]
    assert rows
    for row in rows:
        assert not any("tensordesc" in parameter for parameter in row["parameters"])
        assert not any("src_k" in parameter for parameter in row["parameters"])  # else never by descriptors
        assert "_rows.load" not in next((tmp_path / "out" / row["folder"]).glob("*.py")).read_text()
