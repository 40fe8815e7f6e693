"""Pages of mapped weights leave memory and keep their values."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import nn

from tilewright.compiler.paging import page_out, page_out_files
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


def test_pages_of_files_of_one_place_leave(tmp_path) -> None:
    """Whole files, found by their path, which are mapped to be read alone."""
    size, held = 8 << 20, []
    for name in ("here", "there"):
        (tmp_path / name).write_bytes(bytes(range(256)) * (size >> 8))
        with (tmp_path / name).open("rb") as file:
            held.append(mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))
    want = [bytes(h) for h in held]
    before = resident()
    page_out_files(f"{tmp_path}/here")
    after = resident()
    assert 0.9 * size < before - after < 1.1 * size, "of one file"
    assert [bytes(h) for h in held] == want


def test_other_tensors_stay_as_they_are() -> None:
    for tensor in (torch.randn(5000, 3), torch.randn(64, 64).T, torch.empty(0), torch.eye(9).to_sparse()):
        want = tensor.clone()
        page_out(tensor)
        assert torch.equal(tensor.to_dense(), want.to_dense())
