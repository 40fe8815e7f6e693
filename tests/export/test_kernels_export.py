"""Kernel bundles: sources, binaries, launchers that compile, figures that hang together."""

import ctypes
import json
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from torch import nn

import tilewright as tw
from tilewright.compiler.diagnostics import ExportError
from tilewright.frontends.export import kernels_export
from tilewright.frontends.export.artifact import faults
from tilewright.runtime.contracts import Target
from tilewright.runtime.occupancy import occupancy
from tilewright.runtime.offline import Resources

BACKENDS = Path(triton.__file__).parent / "backends"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(320)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("kernels") / "out"
    targets = (Target("cuda", "sm_89"), Target("cuda", "sm_90"), Target("hip", "gfx950"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels_export, "GPU_TARGETS", targets)
        return path, tw.export(Block(), (torch.randn(2, 7, 320),), "exact", path, "kernels")


def test_files_of_each_target(bundle: tuple[Path, dict]) -> None:
    path, manifest = bundle
    assert faults(path) == []
    assert [row["target"] for row in manifest["kernels"]] == [
        "cpu:avx2" if "cpu:avx2" in manifest["kernels"][0]["target"] else "cpu:avx512",
        "cuda:sm_89",
        "cuda:sm_90",
        "hip:gfx950",
    ]
    for row in manifest["kernels"][1:]:
        folder, name = path / row["folder"], row["kernel"]
        binary = "hsaco" if "gfx" in row["target"] else "cubin"
        assert (folder / f"{name}.{binary}").read_bytes()[:4] == b"\x7fELF"
        assert row["constants"] == {"BLOCK": 512}
        assert row["fits"]
        assert 0 < row["occupancy"] <= 1
    assert ".target sm_90a" in next(path.glob("sm_90/*/*.ptx")).read_text()
    assert ".target sm_89" in next(path.glob("sm_89/*/*.ptx")).read_text()
    assert "gfx950" in next(path.glob("gfx950/*/*.amdgcn")).read_text()
    assert json.loads((path / "resources.json").read_text()) == manifest["kernels"]


@pytest.mark.parametrize(
    ("folder", "flags"),
    [
        ("sm_90", [f"-I{BACKENDS / 'nvidia' / 'include'}"]),
        ("gfx950", [f"-I{BACKENDS / 'amd' / 'include'}", "-D__HIP_PLATFORM_AMD__"]),
    ],
)
def test_launchers_compile(bundle: tuple[Path, dict], tmp_path: Path, folder: str, flags: list[str]) -> None:
    source = next(bundle[0].glob(f"{folder}/*/*.c"))
    command = ["gcc", "-Wall", "-Werror", "-c", *flags, str(source), "-o", str(tmp_path / "launcher.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


DRIVER = """
#include <string.h>
#include <stdio.h>
typedef int CUresult; typedef unsigned long long CUdeviceptr; typedef void *CUstream, *CUmodule, *CUfunction;
char log_[4096];
CUresult cuModuleLoad(CUmodule *m, const char *p) { *m = (void *)1; strcat(log_, p); return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) { strcat(log_, n); return 0; }
CUresult cuFuncSetAttribute(CUfunction f, int a, int v) { return 0; }
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared, CUstream s, void **a, void **e) {
    sprintf(log_, "%u %u %u | %llu %llu %llu %d %.3f %llu", gx, gy, bx, *(CUdeviceptr *)a[0],
            *(CUdeviceptr *)a[1], *(CUdeviceptr *)a[2], *(int *)a[3], *(float *)a[4], *(CUdeviceptr *)a[5]);
    return 0;
}
"""


def test_a_launcher_passes_what_the_kernel_takes(bundle: tuple[Path, dict], tmp_path: Path) -> None:
    """Against a driver that writes down what it is given: floats go as floats, scratch pointers are null."""
    (tmp_path / "driver.c").write_text(DRIVER)
    source = next(bundle[0].glob("sm_90/*/*.c"))
    library = tmp_path / "launcher.so"
    include = f"-I{BACKENDS / 'nvidia' / 'include'}"
    parts = [tmp_path / "driver.o", tmp_path / "launcher.o"]
    for file, part, flags in ((tmp_path / "driver.c", parts[0], []), (source, parts[1], [include])):
        subprocess.run(["gcc", "-c", "-fPIC", *flags, str(file), "-o", str(part)], check=True)
    subprocess.run(["gcc", "-shared", *map(str, parts), "-o", str(library)], check=True)
    loaded, name = ctypes.CDLL(str(library)), source.stem
    log = ctypes.c_char.in_dll(loaded, "log_")
    assert getattr(loaded, f"{name}_load")(b"file.cubin ") == 0
    assert ctypes.string_at(ctypes.addressof(log)) == b"file.cubin " + name.encode()
    pointers = [ctypes.c_uint64(v) for v in (16, 32, 48)]
    numbers = [ctypes.c_int32(320), ctypes.c_float(0.125)]
    assert getattr(loaded, f"{name}_launch")(None, 14, 1, *pointers, *numbers) == 0
    assert ctypes.string_at(ctypes.addressof(log)) == b"14 1 32 | 16 32 48 320 0.125 0"


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "share", "limit"),
    [
        ("sm_80", 255, 0, 8, 8 / 64, "registers"),
        ("sm_90", 128, 0, 4, 16 / 64, "registers"),
        ("sm_90", 32, 100 * 1024, 4, 8 / 64, "shared memory"),
        ("sm_120", 32, 100 * 1024, 4, 0.0, "shared memory"),
        ("sm_80", 16, 0, 1, 0.5, "blocks"),
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, warps: int, share: float, limit: str) -> None:
    found = occupancy(Resources(registers, 0, shared, 0), warps, Target("cuda", arch))
    assert (found.share, found.limit) == (share, limit)


def test_a_model_without_our_kernels(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin()

    with pytest.raises(ExportError, match="no kernel of ours"):
        tw.export(Plain(), (torch.randn(3),), "exact", tmp_path / "out", "kernels")
    assert list(tmp_path.iterdir()) == []
