"""Artifacts: whole or absent, and every change to one is seen."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tilewright.compiler.diagnostics import ExportError, LoadError
from tilewright.frontends.cli import main
from tilewright.frontends.export.artifact import (
    MANIFEST,
    checked_manifest,
    faults,
    new_artifact,
    read_manifest,
    render,
)

LOOP = """
import sys
from pathlib import Path
from tilewright.frontends.export.artifact import new_artifact
parent, number = Path(sys.argv[1]), 0
print("ready", flush=True)
while True:
    with new_artifact(parent / f"out{number}") as artifact:
        for i in range(12):
            artifact.write(f"part{i % 3}/file{i}.bin", bytes([i]) * 40000)
        artifact.finish({"number": number})
    print("whole", flush=True)
    number += 1
"""


def make(path: Path) -> Path:
    with new_artifact(path) as artifact:
        artifact.write("model.bin", bytes(range(256)) * 20)
        artifact.write("sm_90/kernel.ptx", "text")
        artifact.finish({"kind": "onnx", "model": {"name": "m"}})
    return path


def test_round_trip(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    manifest = checked_manifest(folder)
    assert manifest["kind"] == "onnx"
    assert manifest["files"]["model.bin"]["bytes"] == 5120
    assert set(os.listdir(tmp_path)) == {"out"}


def test_a_taken_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="already exists"), new_artifact(tmp_path / "out"):
        raise AssertionError("never runs")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ExportError, match="already exists"), new_artifact(tmp_path / "link"):
        raise AssertionError("never runs")
    with pytest.raises(ExportError, match="parent"), new_artifact(tmp_path / "a" / "b"):
        raise AssertionError("never runs")


def test_a_place_taken_meanwhile_is_kept(tmp_path: Path) -> None:
    final = tmp_path / "out"

    def meanwhile() -> None:
        with new_artifact(final) as artifact:
            artifact.write("a", b"1")
            final.mkdir()
            (final / "mine").write_text("kept")
            artifact.finish({})

    with pytest.raises(ExportError, match="already exists"):
        meanwhile()
    assert os.listdir(tmp_path) == ["out"]
    assert (final / "mine").read_text() == "kept"


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def failing(error: Exception) -> None:
        with new_artifact(tmp_path / "out") as artifact:
            artifact.write("a", b"1")
            raise error

    with pytest.raises(KeyError):
        failing(KeyError("x"))
    with pytest.raises(ExportError, match="no space left"):
        failing(OSError(errno.ENOSPC, "No space left on device"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../x", ".hidden", "a//b", "x\0", "a/b/c/d/e", MANIFEST, "é"]
)
def test_hostile_file_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="named"), new_artifact(tmp_path / "out") as artifact:
        artifact.write(name, b"1")


def test_every_flipped_byte_is_seen(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    chosen = random.Random(3)
    names = ["model.bin", "sm_90/kernel.ptx", MANIFEST]
    for _ in range(1000):
        path = folder / chosen.choice(names)
        data = path.read_bytes()
        at = chosen.randrange(len(data))
        changed = bytearray(data)
        changed[at] ^= 1 << chosen.randrange(8)
        path.write_bytes(changed)
        try:
            assert faults(folder), f"{path.name} byte {at}"
        except LoadError:
            assert path.name == MANIFEST
        path.write_bytes(data)
    assert faults(folder) == []


def test_missing_extra_and_odd_files(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    (folder / "extra").write_text("")
    (folder / "empty").mkdir()
    (folder / "sm_90" / "pipe").touch()
    (folder / "sm_90" / "pipe").unlink()
    os.mkfifo(folder / "sm_90" / "pipe")
    (folder / "link").symlink_to("model.bin")
    (folder / "model.bin").unlink()
    assert sorted(faults(folder)) == [
        "empty: was added",
        "extra: was added",
        "link: is a symbolic link",
        "model.bin: is missing",
        "sm_90/pipe: is not a regular file",
    ]


def test_links_in_place_of_files(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    (tmp_path / "else").write_bytes((folder / "model.bin").read_bytes())
    (folder / "model.bin").unlink()
    os.link(tmp_path / "else", folder / "model.bin")
    assert any("hard links" in fault for fault in faults(folder))
    (folder / "model.bin").unlink()
    (folder / "model.bin").symlink_to(tmp_path / "else")
    assert any("symbolic link" in fault for fault in faults(folder))


@pytest.mark.parametrize("name", ["../else", "/etc/passwd", "a/../../b"])
def test_manifests_that_name_files_outside(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "out")
    manifest = read_manifest(folder)
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    (folder / MANIFEST).write_bytes(render(manifest))
    with pytest.raises(LoadError, match="no export writes"):
        faults(folder)


def test_the_command(tmp_path: Path, capsys) -> None:
    folder = make(tmp_path / "out")
    assert main(["verify", str(folder)]) == 0
    (folder / "model.bin").write_bytes(b"x")
    assert main(["verify", str(folder)]) == 1
    assert main(["verify", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def killed_exports(parent: Path, points: int) -> tuple[int, int]:
    """Kill an export loop at random moments, at every other point after a first export is whole.

    Folders under final names are whole. Returns (their count, exports that were cut off).
    """
    chosen, whole, cut = random.Random(5), 0, 0
    for point in range(points):
        place = parent / str(point)
        place.mkdir()
        child = subprocess.Popen([sys.executable, "-c", LOOP, str(place)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        if point % 2:
            assert child.stdout.readline() == b"whole\n"
        time.sleep(chosen.uniform(0.0, 0.08))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        for name in os.listdir(place):
            if name.startswith("out"):
                assert faults(place / name) == []
                whole += 1
            cut += name.startswith(".tilewright-unfinished-")
        with new_artifact(place / "again") as artifact:
            artifact.write("a", b"1")
            artifact.finish({})
    return whole, cut


def test_killed_exports(tmp_path: Path) -> None:
    whole, cut = killed_exports(tmp_path, 10)
    assert whole >= 5  # every other point waited for one
    assert cut >= 1


@pytest.mark.slow
def test_100_killed_exports(tmp_path: Path) -> None:
    whole, cut = killed_exports(tmp_path, 100)
    assert whole >= 50
    assert cut >= 25


def test_leftovers_of_a_killed_export_are_swept(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "out") as running:
        running.write("a", b"1")
        orphan = running.folder.with_name(running.folder.name[:-4] + "dead")
        orphan.mkdir()
        (orphan / "half").write_text("x")
        with pytest.raises(ExportError, match="without a manifest"), new_artifact(tmp_path / "out"):
            assert not orphan.exists()
        assert running.folder.is_dir()  # the lock of a live export keeps it
        running.finish({})
    assert os.listdir(tmp_path) == ["out"]
