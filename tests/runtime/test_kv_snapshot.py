"""Snapshots: restored bitwise, published at once, refused when damaged, foreign or too new."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch

from tilewright.runtime.kv_store import snapshot
from tilewright.runtime.kv_store.snapshot import SnapshotError, load_snapshot, save_snapshot

PRINTS = {"model": "smollm2-abc", "tokenizer": "tok-1"}


def session(seed: int = 0) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(6, 3, 16, 8, generator=generator)
    tensors = {
        "layer0.k": pool[:4],
        "layer0.v": pool[2:].transpose(1, 2),  # shares memory with the keys
        "layer0.table": torch.tensor([[0, 2, -1]], dtype=torch.int32),
        "layer1.k": pool.bfloat16(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(float("nan")),
    }
    return tensors, {"lengths": [33 + seed], "page": 16, "pipeline": "quest-kv{budget=256}", "seed": seed}


def equal(saved: dict, tensors: dict) -> bool:
    return saved.keys() == tensors.keys() and all(
        saved[n].dtype == t.dtype and torch.equal(saved[n].nan_to_num(7.0), t.nan_to_num(7.0))
        for n, t in tensors.items()
    )


@pytest.fixture
def saved(tmp_path):
    save_snapshot(tmp_path / "s", *session(), **PRINTS)
    return tmp_path / "s"


def test_round_trip_is_bitwise(saved):
    back = load_snapshot(saved, **PRINTS)
    tensors, metadata = session()
    assert equal(back.tensors, tensors)
    assert back.metadata == metadata
    assert {(saved / name).stat().st_mode & 0o077 for name in os.listdir(saved)} == {0}
    assert saved.stat().st_mode & 0o777 == 0o700


def test_nothing_is_overwritten_unasked(saved):
    with pytest.raises(SnapshotError, match="ask for overwrite"):
        save_snapshot(saved, *session(1), **PRINTS)
    assert load_snapshot(saved, **PRINTS).metadata["seed"] == 0
    save_snapshot(saved, *session(1), **PRINTS, overwrite=True)
    back = load_snapshot(saved, **PRINTS)
    assert back.metadata["seed"] == 1
    assert equal(back.tensors, session(1)[0])
    assert len(os.listdir(saved)) == 2


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SnapshotError, match=r"not a snapshot: it holds 'notes\.txt'"):
        save_snapshot(tmp_path, *session(), **PRINTS, overwrite=True)
    assert os.listdir(tmp_path) == ["notes.txt"]
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(SnapshotError, match="cannot be used"):
        save_snapshot(tmp_path / "link", *session(), **PRINTS)


@pytest.mark.parametrize("name", ["model", "tokenizer"])
def test_another_model_or_tokenizer_is_refused(saved, name):
    with pytest.raises(SnapshotError, match=f"of another {name}: '{PRINTS[name]}', not 'other'"):
        load_snapshot(saved, **(PRINTS | {name: "other"}))


def test_an_absent_snapshot_is_refused_and_nothing_is_made(tmp_path):
    with pytest.raises(SnapshotError, match="there is no snapshot"):
        load_snapshot(tmp_path / "none", **PRINTS)
    assert os.listdir(tmp_path) == []
    with pytest.raises(SnapshotError, match="there is no snapshot"):
        load_snapshot(tmp_path, **PRINTS)


def test_every_changed_byte_is_refused(saved):
    for path in saved.iterdir():
        content = path.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 97)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            with pytest.raises(SnapshotError, match="damaged|version|another|not the manifest"):
                load_snapshot(saved, **PRINTS)
        for length in (0, 1, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            with pytest.raises(SnapshotError, match="damaged"):
                load_snapshot(saved, **PRINTS)
        path.write_bytes(content)
    assert equal(load_snapshot(saved, **PRINTS).tensors, session()[0])


def reseal(folder, **changes) -> None:
    path = folder / "manifest.json"
    body = json.loads(path.read_text())["body"] | changes
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"body": body, "sha256": digest}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 2}, "has version 2; this reads up to 1"),
        ({"format": "other"}, "not the manifest of a snapshot"),
        ({"tensors": {"file": "../other.safetensors", "sha256": "", "bytes": 1}}, "names a file '../other"),
        ({"tensors": {"file": f"tensors-{'0' * 32}.safetensors", "sha256": "", "bytes": 1}}, "No such file"),
    ],
)
def test_too_new_and_foreign_manifests_are_refused(saved, changes, reason):
    reseal(saved, **changes)
    with pytest.raises(SnapshotError, match=reason):
        load_snapshot(saved, **PRINTS)


def test_links_are_not_followed(saved, tmp_path):
    for path in list(saved.iterdir()):
        moved = tmp_path / path.name
        path.rename(moved)
        path.symlink_to(moved)
        with pytest.raises(SnapshotError, match="damaged"):
            load_snapshot(saved, **PRINTS)
        path.unlink()
        moved.rename(path)


@pytest.mark.parametrize("value", [float("nan"), (1, 2), {1: 2}, {"x": {3}}])
def test_metadata_that_json_would_change_is_refused(saved, value):
    with pytest.raises(SnapshotError, match="cannot be written"):
        save_snapshot(saved, session()[0], {"x": value}, **PRINTS, overwrite=True)
    assert load_snapshot(saved, **PRINTS).metadata == session()[1]
    assert len(os.listdir(saved)) == 2


def test_empty_fingerprints_are_refused(tmp_path):
    with pytest.raises(SnapshotError, match="the fingerprint tokenizer is empty"):
        save_snapshot(tmp_path / "s", *session(), model="m", tokenizer="")


def test_a_full_disk_keeps_the_old_snapshot(saved, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snapshot, "_write_new", full)
    with pytest.raises(SnapshotError, match="cannot be written: .*No space left"):
        save_snapshot(saved, *session(1), **PRINTS, overwrite=True)
    assert load_snapshot(saved, **PRINTS).metadata["seed"] == 0
    assert len(os.listdir(saved)) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from tilewright.runtime.kv_store import snapshot

def dying(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

folder = Path(sys.argv[1])

def save(value, size):
    tensors = {"k": torch.full((size,), float(value))}
    snapshot.save_snapshot(folder, tensors, {"seed": value}, model="m", tokenizer="t", overwrite=True)

for die_at in range(1, 99):
    save(0, 7)
    pid = os.fork()
    if not pid:
        calls = 0
        for module, names in ((snapshot.safetensors.torch, ["save_file"]),
                              (os, ["chmod", "fsync", "rename", "listdir", "unlink"])):
            for name in names:
                setattr(module, name, dying(getattr(module, name)))
        save(9, 1000)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    back = snapshot.load_snapshot(folder, model="m", tokenizer="t")
    seed, k = back.metadata["seed"], back.tensors["k"]
    assert torch.equal(k, torch.full((1000,), 9.0) if seed else torch.zeros(7))
    print(seed, flush=True)
    if status == 0:
        break
    assert status == signal.SIGKILL, status
"""


def test_killed_at_any_point_leaves_the_old_or_the_new(tmp_path):
    folder = tmp_path / "s"
    command = [sys.executable, "-c", KILLED, str(folder)]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    seen = [int(line) for line in done.stdout.split()]
    # Old up to the rename, new after it; each later save cleared what the killed one left.
    assert seen == sorted(seen)
    assert seen.count(0) >= 5
    assert seen.count(9) >= 3
    assert len(os.listdir(folder)) == 2
