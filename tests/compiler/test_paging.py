"""Pages of mapped weights leave memory and keep their values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.paging import in_a_file, page_out
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


def test_tensors_of_a_scratch_file_are_written_to_and_leave(tmp_path) -> None:
    want = torch.randn(2048, 1024)
    held = in_a_file(want.t(), tmp_path)
    assert held.shape == (1024, 2048)
    assert held.is_contiguous()
    assert not list(tmp_path.iterdir()), "the file has no name"
    for _ in range(2):
        before = resident()
        held.add_(1.0)
        want += 1.0
        assert resident() > before + 0.9 * want.nbytes
        page_out(held)
        assert resident() < before + 0.1 * want.nbytes
    assert torch.equal(held.t(), want)


def test_a_folder_that_takes_no_file_is_one_clear_error(tmp_path) -> None:
    with pytest.raises(OptionError, match="nowhere.*No such file"):
        in_a_file(torch.zeros(5000), tmp_path / "nowhere")
    small = torch.zeros(3)
    assert in_a_file(small, tmp_path / "nowhere") is small


def test_other_tensors_stay_as_they_are() -> None:
    for tensor in (torch.randn(5000, 3), torch.randn(64, 64).T, torch.empty(0), torch.eye(9).to_sparse()):
        want = tensor.clone()
        page_out(tensor)
        assert torch.equal(tensor.to_dense(), want.to_dense())
