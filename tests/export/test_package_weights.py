"""Weights beside packages: equal ones once, read back bit for bit, gone when their last reader is."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tilewright.compiler.diagnostics import LoadError
from tilewright.frontends.export.package_weights import content_name, own_name, read_weights, write_weights

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES}
    return found | {"scalar": torch.tensor(7.0), "empty": torch.empty(0, 4), "turned": torch.randn(4, 6).T}


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    given = tensors()
    write_weights(tmp_path / "w.safetensors", given)
    weights = read_weights([tmp_path / "w.safetensors"])
    found = weights.of("program", given)
    for name, tensor in given.items():
        got = found[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (got, tensor))), name
        assert got.is_contiguous()
        assert got.data_ptr() % 64 == 0, "as kernels want it"


def test_tensors_that_share_memory_are_stored_apart(tmp_path: Path) -> None:
    whole = torch.arange(24.0)
    given = {"whole": whole, "view": whole.view(4, 6), "part": whole[6:12], "other": whole[18:]}
    write_weights(tmp_path / "w.safetensors", given)
    found = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())


def test_a_name_is_the_content() -> None:
    x = torch.randn(4, 6)
    assert content_name(x) == content_name(x.clone()) == content_name(x.T.contiguous().T)
    assert content_name(x).isidentifier()
    other = x.clone()
    other[3, 5] += 1
    others = (other, x.view(6, 4), x.double(), x.view(torch.int32), x[:3], x.T)
    assert len({content_name(t) for t in (x, *others)}) == 1 + len(others)


def test_programs_find_what_is_shared_and_what_is_their_own(tmp_path: Path) -> None:
    given = {"shared": torch.ones(2), own_name("decode", "extra"): torch.zeros(3)}
    write_weights(tmp_path / "w.safetensors", given)
    weights = read_weights([tmp_path / "w.safetensors"])
    found = weights.of("decode", ["shared", "extra"])
    assert torch.equal(found["shared"], torch.ones(2))
    assert torch.equal(found["extra"], torch.zeros(3))
    with pytest.raises(KeyError, match=r"prefill\.extra"):
        weights.of("prefill", ["shared", "extra"])


def test_memory_ends_with_the_last_reader(tmp_path: Path) -> None:
    """Also where somebody keeps the tensors themselves, as PyTorch's loader does."""
    write_weights(tmp_path / "w.safetensors", {"w": torch.randn(1000)})
    weights = read_weights([tmp_path / "w.safetensors"])
    kept = weights.of("program", ["w"])["w"]
    view, ended = kept[:10], weakref.ref(weights)
    want = view.clone()
    assert kept.untyped_storage().nbytes() == 4000
    del weights
    gc.collect()
    assert ended() is None
    assert kept.untyped_storage().nbytes() == 0
    assert torch.equal(view, want), "what a caller took out of it stays"


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_weights(path, {"w": torch.randn(10)})
    whole = path.read_bytes()
    for damaged, said in (
        (whole[:-4], "its tensors need 40 bytes and it has 36"),
        (whole.replace(b'"F32"', b'"C64"').replace(b"[10]", b"[5] "), "has the dtype C64"),
        (b"\xff" * 40, "header of"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(LoadError, match=said):
            read_weights([path])
