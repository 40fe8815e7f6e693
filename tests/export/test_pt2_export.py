"""pt2 packages: run in a fresh process without a compiler; archives of strangers are refused."""

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright.compiler.diagnostics import LoadError
from tilewright.compiler.parity import relative_rms
from tilewright.frontends.export.artifact import MANIFEST, read_manifest, render
from tilewright.frontends.export.package import check_archive, load_package
from tilewright.runtime.build import find_compiler

GOOD = {"m/archive_format": b"pt2", "m/data/aotinductor/model/a.so": b"\x7fELF", "m/byteorder": b"little"}


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name), data)
    return path


def test_a_plain_archive_passes(tmp_path: Path) -> None:
    check_archive(archive(tmp_path / "x.pt2", GOOD))


@pytest.mark.parametrize(
    "name",
    [
        "../evil.so", "/etc/evil.so", "m/../../evil.so", "m\\..\\evil.so", "C:/evil.so", "m/./a.so",
        "m/data.pkl", "m/data/constants/weights.pt", "m/data/sample_inputs/model.so", "m/a.pickle",
        "m/data/custom_obj_0.bin", "other/a.so", "m/a\n.so", "m/", "m/é.so", "m//a.so", "m/run.py",
    ],
)  # fmt: skip
def test_hostile_members(tmp_path: Path, name: str) -> None:
    with pytest.raises(LoadError):
        check_archive(archive(tmp_path / "x.pt2", {**GOOD, name: b"x"}))


def test_links_bombs_and_no_archives(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("m/a.so")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.pt2", "w") as file:
        file.writestr(link, "/etc/passwd")
    with zipfile.ZipFile(tmp_path / "bomb.pt2", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/a.so", b"\0" * (8 << 20))
    (tmp_path / "text.pt2").write_text("not a zip")
    for name, match in (("link", "link"), ("bomb", "unpack to"), ("text", "not a .pt2")):
        with pytest.raises(LoadError, match=match):
            check_archive(tmp_path / f"{name}.pt2")


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.mkdir, (os.environ["CANARY"],))


def artifact(folder: Path, members: dict[str, bytes]) -> Path:
    from tilewright.frontends.export.artifact import new_artifact

    with new_artifact(folder) as made:
        archive(made.path("call.pt2"), members)
        row = {"name": "call", "file": "call.pt2", "operators": [], "weights": []}
        made.finish({"kind": "pt2", "entries": [row]})
    return folder


def test_a_pickle_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    for i, name in enumerate(("m/data.pkl", "m/data/weights/model.pt", "m/extra/custom_obj_1")):
        folder = artifact(tmp_path / str(i), {**GOOD, name: pickle.dumps(Bomb())})
        with pytest.raises(LoadError, match="its member"):
            load_package(folder)
    assert not (tmp_path / "canary").exists()


def test_damage_and_foreign_manifests(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "out", GOOD)
    manifest = read_manifest(folder)
    del manifest["entries"][0]["weights"]
    (folder / MANIFEST).write_bytes(render(manifest))
    with pytest.raises(LoadError, match=r"weights in its programs.*export again"):
        load_package(folder)
    for part, name in (("operators", "../evil.so"), ("weights", "../evil.safetensors")):
        manifest = read_manifest(folder)
        (row,) = manifest["entries"]
        manifest["entries"] = [{**row, "operators": [], "weights": [], part: [name]}]
        (folder / MANIFEST).write_bytes(render(manifest))
        with pytest.raises(LoadError, match=f"{name}' is not among its files"):
            load_package(folder)
    data = bytearray((folder / "call.pt2").read_bytes())
    data[40] ^= 1
    (folder / "call.pt2").write_bytes(data)
    with pytest.raises(LoadError, match="content was changed"):
        load_package(folder)


FRESH = """
import sys, time, torch
from tilewright.frontends.export.package import load_package
def no_compiler(event, args):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn") and "++" in str(args[0]):
        print("a compiler was started", args, file=sys.stderr, flush=True)
        raise SystemExit(3)
sys.addaudithook(no_compiler)
x = torch.load(sys.argv[2], weights_only=True)
run = load_package(sys.argv[1])
started = time.perf_counter()
y = run(x)[0]
torch.save(y, sys.argv[3])
print(time.perf_counter() - started)
"""


AGAIN = """
import sys, torch
import tilewright as tw
from tilewright.compiler.parity import relative_rms
from tilewright.frontends.export.package import load_package
sys.path.insert(0, sys.argv[4])
from test_pt2_export import Block
x = torch.load(sys.argv[2], weights_only=True)
torch.manual_seed(0)
module = Block().eval()
packed = load_package(sys.argv[1])
before = packed(x)[0]
built = tw.optimize(module, (x,), "quantize-linear{weight=int8}")
found = built(x)
assert any(row["source"] for row in built.report.kernels), "no kernel was built here"
with torch.no_grad():
    assert relative_rms(found, before) < 1e-3 and relative_rms(found, module(x)) < 0.05
assert torch.equal(packed(x)[0], before)
print("both ran")
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(320), nn.Linear(320, 160), nn.Linear(160, 320)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


@pytest.mark.slow
def test_a_package_in_a_fresh_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Block().eval(), torch.randn(2, 70, 320)
    pipeline = "quantize-linear{weight=int8}"
    manifest = tw.export(module, (x,), pipeline, tmp_path / "out", "pt2", dynamic={"x": {1: "rows"}})
    (entry,) = manifest["entries"]
    assert entry["parity"]["example"]["program"] < 1e-3
    assert len(entry["operators"]) >= 1
    other = torch.randn(2, 33, 320)
    torch.save(other, tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("out", "x.pt", "y.pt")]
    command = [sys.executable, "-c", FRESH, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.strip().splitlines()[-1]) < 1.0
    with torch.no_grad():
        want = module(other)
    assert relative_rms(torch.load(tmp_path / "y.pt", weights_only=True), want) < 0.05
    command[2:] = [AGAIN, *files, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "both ran"), done.stderr[-2000:]
    got = run_without_python(tmp_path, manifest, other)
    assert relative_rms(got.view(want.shape), want) < 0.05


def run_without_python(folder: Path, manifest: dict, x: torch.Tensor) -> torch.Tensor:
    """Build the program that lies beside the package and run it on one input."""
    root = Path(torch.__file__).parent
    build = [find_compiler()[0], "-std=c++20", str(folder / "out" / "run.cpp"), "-o", str(folder / "run")]
    build += [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", f"-L{root / 'lib'}"]
    build += [f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    subprocess.run(build, check=True, capture_output=True)
    (folder / "x.bin").write_bytes(x.numpy().tobytes())
    (entry,) = manifest["entries"]
    words = [str(folder / "run"), str(folder / "out" / entry["file"])]
    words += [str(folder / "out" / name) for name in (*entry["operators"], *entry["weights"])]
    words += ["--", f"float32:{'x'.join(map(str, x.shape))}:{folder / 'x.bin'}"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    linked = subprocess.run(["ldd", str(folder / "run")], capture_output=True, text=True, check=True)
    assert "libpython" not in linked.stdout
    assert float(done.stdout.rsplit("first call ", 1)[1].split()[0]) < 1.0
    return torch.frombuffer(bytearray((folder / "output0.bin").read_bytes()), dtype=torch.float32)
