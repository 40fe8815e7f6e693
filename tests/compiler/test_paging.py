"""Pages of mapped weights leave memory and keep their values."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tilewright.compiler.paging import page_out
from tilewright.frontends.weight_offload import offload_weights


def resident() -> int:
    """Bytes of file pages of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssFile")).split()[1]) << 10


def test_mapped_pages_leave_and_come_back(tmp_path) -> None:
    model = nn.Linear(2048, 4096)
    want = model.weight.detach().clone()
    offload_weights(model, tmp_path)
    with torch.no_grad():
        model.weight[0, 0] = want[0, 0] = 3.0
    size = want.numel() * 4
    assert torch.equal(model.weight, want)
    before = resident()
    page_out(model.weight.data)
    assert resident() < before - 0.9 * size
    assert torch.equal(model.weight, want), "also what was written since"
    assert resident() > before - 0.1 * size


def test_other_tensors_stay_as_they_are() -> None:
    for tensor in (torch.randn(5000, 3), torch.randn(64, 64).T, torch.empty(0), torch.eye(9).to_sparse()):
        want = tensor.clone()
        page_out(tensor)
        assert torch.equal(tensor.to_dense(), want.to_dense())
