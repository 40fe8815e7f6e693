"""Block-sparse attention as an ONNX function: equal to its definition for any static layout."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tilewright as tw
from tilewright.compiler import ops
from tilewright.compiler.block_layout import BlockLayout, rows_from_block_mask
from tilewright.compiler.diagnostics import ExportError


class Sparse(nn.Module):
    def __init__(self, layout: BlockLayout, *, lse: bool = False) -> None:
        super().__init__()
        self.rest, self.lse = list(layout.arguments()), lse
        for i, value in enumerate(self.rest):
            if isinstance(value, Tensor):
                self.register_buffer(f"layout{i}", value)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rest = [getattr(self, f"layout{i}") if isinstance(x, Tensor) else x for i, x in enumerate(self.rest)]
        out, lse = ops.block_sparse_attention(q, k, v, *rest, 0.3)
        return out + lse[..., None] if self.lse else out


def exported(layout: BlockLayout, path: Path, *, heads: int = 4, kv: int = 4, batch: int = 1) -> dict:
    tokens = 60
    torch.manual_seed(0)
    q = torch.randn(batch, heads, tokens, 16) * 2
    k, v = torch.randn(batch, kv, tokens, 16) * 2, torch.randn(batch, kv, tokens, 24)
    manifest = tw.export(Sparse(layout), (q, k, v), "exact", path)
    assert manifest["entries"][0]["parity"]["example"]["model"] < 1e-5
    return manifest["entries"][0]["operators"]


def test_whole_windows_need_no_mask(tmp_path: Path) -> None:
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    for row in range(5):
        mask[0, row, [row, (row + 2) % 5]] = True
    layout = BlockLayout.from_block_mask(mask, range(0, 61, 12), range(0, 61, 12), 4)
    assert exported(layout, tmp_path / "out")["tilewright::BlockSparseAttention"] == 1


def test_ragged_causal_windows_over_shared_keys(tmp_path: Path) -> None:
    layout = BlockLayout.causal(60, 60, 6, window=20, sink=5, q_block=16, k_block=16)
    counts = exported(layout, tmp_path / "out", heads=6, kv=2, batch=2)
    assert counts["tilewright::MaskedBlockSparseAttention"] == 1


def test_groups_of_heads_in_another_token_order(tmp_path: Path) -> None:
    torch.manual_seed(1)
    mask = torch.rand(2, 4, 3) > 0.4
    mask[:, :, 0] = True
    borders = [0, 15, 30, 45, 60], [0, 20, 40, 60]
    groups = torch.tensor([[1, 0, 0, 1]], dtype=torch.int32)
    layout = BlockLayout.from_block_mask(mask, *borders, 4, head_group=groups)
    order = torch.stack([torch.randperm(60), torch.randperm(60)]).int()
    layout = layout.with_(src_q=order, src_k=order.flip(1).contiguous())
    counts = exported(layout, tmp_path / "out")
    assert sum(n for name, n in counts.items() if name.startswith("tilewright::")) == 2


def test_layouts_that_are_not_written(tmp_path: Path) -> None:
    q = torch.randn(1, 4, 60, 16)
    layout = BlockLayout.causal(60, 60, 4, q_block=16, k_block=16)
    with pytest.raises(ExportError, match="log-sum-exp"):
        tw.export(Sparse(layout, lse=True), (q, q, q), "exact", tmp_path / "out")
    limited = layout.with_(k_valid=torch.tensor([50], dtype=torch.int32))
    with pytest.raises(ExportError, match="k_valid"):
        tw.export(Sparse(limited), (q, q, q), "exact", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Online(nn.Module):
    """Two layers of attention whose blocks the call chooses."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            kept = (x[:, 0, ::15, 0] > 0)[:, :, None] | torch.eye(4, dtype=torch.bool)
            row_ptr, col, _ = rows_from_block_mask(kept)
            borders = torch.arange(0, 61, 15, dtype=torch.int32)[None]
            heads = torch.zeros(1, 4, dtype=torch.int32)
            x = ops.block_sparse_attention(x, x, x, row_ptr, col, borders, borders, heads)[0]
        return torch.linalg.det(x @ x.mT)


def test_layouts_of_the_call_are_refused_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(ExportError) as refused:
        tw.export(Online(), (torch.randn(1, 4, 60, 16),), "exact", tmp_path / "out")
    text, here = str(refused.value), r"\(.*test_onnx_sparse.py:\d+\)"
    attention = rf"block_sparse_attention at \w+, \w+ {here}: a layout whose row_ptr, col, head_group"
    for row in (attention, rf"scatter.src at \w+, \w+ {here}: has no", rf"linalg_det at \w+ {here}: has no"):
        assert re.search(row, text), text
    assert list(tmp_path.iterdir()) == []


def test_a_video_transformer_with_sliding_tiles(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    module = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=24, freq_dim=32, ffn_dim=40, num_layers=1, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    call = {
        "hidden_states": torch.randn(1, 4, 6, 16, 12), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 24), "return_dict": False,
    }  # fmt: skip
    pipeline = "sliding-tile-attention{tile=2x4x3,window=1x1x1}"
    manifest = tw.export(module, (), pipeline, tmp_path / "out", kwargs=call)
    (entry,) = manifest["entries"]
    assert entry["operators"]["tilewright::BlockSparseAttention"] == 1
    assert entry["parity"]["example"]["program"] < 1e-5 < entry["parity"]["example"]["model"]
