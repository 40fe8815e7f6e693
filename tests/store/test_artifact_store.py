"""S2 and S3: what lies in the store is trusted only after it verified; builds happen once."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tilewright.runtime.store import ArtifactStore, FieldDifference, StoreError, key_digest

ROOT = Path(__file__).resolve().parents[2]
KEY = {"op": "add_rms_norm", "target": "cpu:avx2", "compiler": "g++ 12"}
CONTENT = {
    "kernel.cpp": b"int f() { return 1; }\n" * 40,
    "kernel.so": bytes(range(256)) * 16,
    "note.json": b"{}",
}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


class Builder:
    """Writes `CONTENT` and counts how often."""

    def __init__(self, content: dict[str, bytes] | None = None) -> None:
        self.content, self.calls = content or CONTENT, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        for name, data in self.content.items():
            (folder / name).write_bytes(data)


def held(folder: Path) -> dict[str, bytes]:
    """The artifact's files without the store's own two."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith("manifest.")}


def test_builds_once_and_serves_the_same_folder(store):
    build = Builder()
    first = store.get_or_build(KEY, build)
    assert store.get(KEY) == first
    assert store.get_or_build(dict(reversed(KEY.items())), build) == first
    assert build.calls == 1
    assert held(first) == CONTENT
    assert store.verify() == []
    assert store.size() == sum(map(len, CONTENT.values()))
    assert [e.key for e in store.entries()] == [KEY]


def test_a_fresh_store_object_finds_the_entry_again(store):
    build = Builder()
    store.get_or_build(KEY, build)
    assert held(ArtifactStore(store.root).get_or_build(KEY, build)) == CONTENT
    assert build.calls == 1


def test_everything_is_private(store):
    folder = store.get_or_build(KEY, Builder())
    for path in [store.root, *store.root.rglob("*")]:
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path
    assert stat.S_IMODE((store.root / "mac.key").stat().st_mode) == 0o600
    assert folder.is_relative_to(store.root)


def test_each_key_field_makes_another_entry(store):
    build = Builder()
    folders = {store.get_or_build(KEY | {name: "other"}, build) for name in KEY} | {
        store.get_or_build(KEY, build)
    }
    assert len(folders) == build.calls == len(KEY) + 1
    assert key_digest({"a": "b:c"}) != key_digest({"a:b": "c"})


def test_why_miss_names_the_fields(store):
    assert store.why_miss({"b": "2", "a": "1"}) == (
        FieldDifference("a", "1", None),
        FieldDifference("b", "2", None),
    )
    store.get_or_build(KEY, Builder())
    store.get_or_build({"unrelated": "x"}, Builder())
    assert store.why_miss(KEY) == ()
    (difference,) = store.why_miss(KEY | {"compiler": "g++ 13"})
    assert str(difference) == "compiler: wanted 'g++ 13', stored 'g++ 12'"


def test_clear_removes_everything(store):
    store.get_or_build(KEY, Builder())
    (store.root / "entries" / "stranger").write_text("x")
    assert store.clear() == 1
    assert list((store.root / "entries").iterdir()) == []
    build = Builder()
    store.get_or_build(KEY, build)
    assert build.calls == 1


def test_a_failing_build_stores_nothing_and_passes_through(store):
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise FileNotFoundError(2, "No such file", "g++")

    with pytest.raises(FileNotFoundError, match=r"g\+\+"):
        store.get_or_build(KEY, build)
    assert store.entries() == ()
    assert list((store.root / "building").iterdir()) == []


def _link(folder: Path) -> None:
    (folder / "x").symlink_to("/etc/hostname")


def _hard_link(folder: Path) -> None:
    (folder / "x").write_text("x")
    os.link(folder / "x", folder / "y")


BAD_BUILDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda f: None, "wrote no file"),
    "folder": (lambda f: (f / "sub").mkdir(), "not a regular file"),
    "pipe": (lambda f: os.mkfifo(f / "x"), "not a regular file"),
    "link": (_link, "not a regular file"),
    "hard link": (_hard_link, "hard links"),
    "manifest": (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json"),
    "hidden": (lambda f: (f / ".x").write_text("x"), "'.x'"),
}


@pytest.mark.parametrize("case", BAD_BUILDS)
def test_a_build_that_cannot_be_stored_is_an_error(store, case):
    build, message = BAD_BUILDS[case]
    with pytest.raises(StoreError, match=message):
        store.get_or_build(KEY, build)
    assert store.entries() == ()


def test_keys_must_be_text(store):
    with pytest.raises(StoreError, match="'level' is int"):
        store.get_or_build({"level": 3}, Builder())
    with pytest.raises(StoreError, match="empty"):
        store.get_or_build({}, Builder())


def test_refuses_folders_others_control(tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(plain)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="symbolic link"):
        ArtifactStore(tmp_path / "link")
    with pytest.raises(StoreError, match="not a folder"):
        ArtifactStore(tmp_path / "file")
    for mode in (0o770, 0o702):
        plain.chmod(mode)
        with pytest.raises(StoreError, match=f"mode {mode:04o}.*chmod go-w"):
            ArtifactStore(plain)
    plain.chmod(0o755)
    ArtifactStore(plain)
    (plain / "entries").rmdir()
    (plain / "entries").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="symbolic link"):
        ArtifactStore(plain)


def test_refuses_a_folder_of_another_user(tmp_path, monkeypatch):
    (tmp_path / "s").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(StoreError, match="belongs to user"):
        ArtifactStore(tmp_path / "s")


def test_default_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "chosen"))
    assert ArtifactStore.default().root == tmp_path / "chosen"
    monkeypatch.delenv("TILEWRIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert ArtifactStore.default().root == tmp_path / "xdg" / "tilewright"
        assert stat.S_IMODE((tmp_path / "xdg" / "tilewright").stat().st_mode) == 0o700


# ---- S2: planted, damaged, exchanged ----


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.timeout(120)
def test_every_flipped_byte_is_found_and_repaired(store, caplog, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # 300 rebuilds: what is tested is not the disk
    rng, build = random.Random(7), Builder()
    folder = store.get_or_build(KEY, build)
    targets = [*sorted(p.name for p in folder.iterdir()), "manifest.json", "manifest.mac"]
    for round_ in range(300):
        name = targets[round_ % len(targets)]
        _flip(folder / name, rng)
        caplog.clear()
        start = time.monotonic()
        assert held(store.get_or_build(KEY, build)) == CONTENT
        assert time.monotonic() - start < 30
        assert build.calls == round_ + 2, f"a flipped bit of {name} was not noticed"
        assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_a_verified_entry_is_watched_after_it_was_memoised(store):
    """The memo saves hashing, not checking: a later change shows in the metadata and is hashed again."""
    build = Builder()
    folder = store.get_or_build(KEY, build)
    assert store.get_or_build(KEY, build) == folder
    assert not store._memo, "a file may change again within the tick of the clock that it changed in"
    time.sleep(0.15)
    assert store.get_or_build(KEY, build) == folder  # hashed, now old enough to be memoised
    assert store._memo
    info = (folder / "kernel.so").stat()
    _flip(folder / "kernel.so", random.Random(1))
    os.utime(
        folder / "kernel.so", ns=(info.st_atime_ns, info.st_mtime_ns)
    )  # an attacker resets what can be reset
    assert held(store.get_or_build(KEY, build)) == CONTENT
    assert build.calls == 2


def _replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        victim = folder / "kernel.so"
        victim.unlink()
        make(victim)

    return change


def _replace_folder(make: Callable[[Path, Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        away = folder.with_name("away")
        os.rename(folder, away)
        make(folder, away)

    return change


def _hard_linked(path: Path) -> None:
    outside = path.parent.parent.parent / "outside"
    outside.write_bytes(CONTENT["kernel.so"])  # even the right bytes: somebody else holds a name for them
    os.link(outside, path)


def _grow(folder: Path) -> None:
    with (folder / "kernel.so").open("ab") as file:
        file.write(b"x")


ATTACKS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda f: os.truncate(f / "kernel.so", 100),
    "emptied": lambda f: os.truncate(f / "kernel.so", 0),
    "grown": _grow,
    "deleted": lambda f: (f / "kernel.so").unlink(),
    "added": lambda f: (f / "extra.so").write_bytes(b"x"),
    "pipe": _replace_by(os.mkfifo),
    "link": _replace_by(lambda p: p.symlink_to("/bin/sh")),
    "link to itself": _replace_by(lambda p: p.symlink_to(p)),
    "hard link": _replace_by(_hard_linked),
    "directory": _replace_by(Path.mkdir),
    "device link": _replace_by(lambda p: p.symlink_to("/dev/zero")),
    "manifest deleted": lambda f: (f / "manifest.json").unlink(),
    "manifest pipe": lambda f: ((f / "manifest.json").unlink(), os.mkfifo(f / "manifest.json")),
    "mac pipe": lambda f: ((f / "manifest.mac").unlink(), os.mkfifo(f / "manifest.mac")),
    "manifest huge": lambda f: os.truncate(f / "manifest.json", 1 << 34),
    "all deleted": lambda f: [p.unlink() for p in f.iterdir()],
    "folder is a pipe": _replace_folder(lambda f, away: os.mkfifo(f)),
    "folder is a file": _replace_folder(lambda f, away: f.write_bytes(b"x")),
    "folder is a link": _replace_folder(lambda f, away: f.symlink_to(away)),
    "folder unreadable": lambda f: f.chmod(0),
    "folder open to all": lambda f: f.chmod(0o777),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("attack", ATTACKS)
def test_planted_content_is_never_served(store, caplog, attack):
    build = Builder()
    folder = store.get_or_build(KEY, build)
    ATTACKS[attack](folder)
    assert store.verify() != [] or (attack == "folder unreadable" and os.geteuid() == 0)
    assert held(store.get_or_build(KEY, build)) == CONTENT
    if attack == "folder unreadable" and os.geteuid() == 0:
        return  # nothing is unreadable to root: the entry was right and was served
    assert build.calls == 2
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    assert not (store.root / "entries" / folder.name).is_symlink()


def test_exchanged_entries_are_found(store):
    one, two = Builder({"a": b"one"}), Builder({"a": b"two"})
    first, second = store.get_or_build({"n": "1"}, one), store.get_or_build({"n": "2"}, two)
    os.rename(first, first.with_name("x"))
    os.rename(second, first)
    os.rename(first.with_name("x"), second)
    assert held(store.get_or_build({"n": "1"}, one)) == {"a": b"one"}
    assert held(store.get_or_build({"n": "2"}, two)) == {"a": b"two"}
    assert (one.calls, two.calls) == (2, 2)


def test_an_entry_of_another_users_store_is_not_trusted(store, tmp_path):
    evil = ArtifactStore(tmp_path / "evil")
    planted = evil.get_or_build(KEY, Builder({"kernel.so": b"evil"}))
    shutil.copytree(planted, store.root / "entries" / planted.name)
    build = Builder()
    assert held(store.get_or_build(KEY, build)) == CONTENT
    assert build.calls == 1


@pytest.mark.parametrize("damage", ["short", "pipe", "link", "readable", "deleted"])
@pytest.mark.timeout(30)
def test_a_damaged_secret_is_replaced_and_entries_are_rebuilt(store, tmp_path, damage):
    build = Builder()
    store.get_or_build(KEY, build)
    secret = store.root / "mac.key"
    if damage == "short":
        secret.write_bytes(b"x")
    elif damage == "readable":
        secret.chmod(0o644)
    else:
        secret.unlink()
    if damage == "pipe":
        os.mkfifo(secret)
    if damage == "link":
        (tmp_path / "known").write_bytes(b"k" * 32)
        secret.symlink_to(tmp_path / "known")
    fresh = ArtifactStore(store.root)
    fresh._memo.clear()
    assert held(fresh.get_or_build(KEY, build)) == CONTENT
    assert build.calls == 2
    assert stat.S_IMODE(secret.lstat().st_mode) == 0o600


@pytest.mark.timeout(30)
def test_a_planted_lock_does_no_harm(store, tmp_path):
    locks, digest = store.root / "locks", key_digest(KEY)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (locks / f"{digest}.lock").symlink_to(victim)
    os.mkfifo(locks / "mac-key.lock")
    assert held(store.get_or_build(KEY, Builder())) == CONTENT
    assert victim.read_text() == "precious"


# ---- S3: many processes, killed processes ----

_CHILD = """
import os, sys, time
from pathlib import Path
from tilewright.runtime.store import ArtifactStore
assert "torch" not in sys.modules
root, log, start = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
def build(folder):
    with open(log, "ab", buffering=0) as file:
        file.write(b"%d\\n" % os.getpid())
    time.sleep(0.2)
    (folder / "a").write_bytes(b"x" * 100000)
time.sleep(max(0.0, start - time.time()))
folder = ArtifactStore(root).get_or_build({"n": "1"}, build)
assert (folder / "a").read_bytes() == b"x" * 100000
"""


def _children(
    count: int, root: Path, log: Path, code: str = _CHILD, delay: float = 1.0
) -> list[subprocess.Popen]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", code, str(root), str(log), str(time.time() + delay)]
    return [subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE) for _ in range(count)]


def _cold_start(count: int, tmp_path: Path, delay: float) -> None:
    log = tmp_path / "log"
    for child in _children(count, tmp_path / "store", log, delay=delay):
        _, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors.decode()
    assert len(log.read_text().splitlines()) == 1, "the artifact was built more than once"
    assert ArtifactStore(tmp_path / "store").verify() == []


@pytest.mark.timeout(120)
def test_parallel_cold_starts_build_once(tmp_path):
    _cold_start(16, tmp_path, 2.0)


@pytest.mark.slow
def test_fifty_parallel_cold_starts_build_once(tmp_path):
    _cold_start(50, tmp_path, 8.0)


@pytest.mark.timeout(60)
def test_a_killed_build_leaves_nothing_and_blocks_nobody(tmp_path):
    log = tmp_path / "log"
    code = _CHILD.replace("time.sleep(0.2)", "(folder / 'a').write_bytes(b'half'); time.sleep(600)")
    (child,) = _children(1, tmp_path / "store", log, code, delay=0.0)
    while not log.exists() or not list((tmp_path / "store" / "building").rglob("a")):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stderr.close()
    store = ArtifactStore(tmp_path / "store")
    assert store.entries() == ()
    other = store.get_or_build({"n": "another"}, Builder())  # any miss sweeps
    assert held(other) == CONTENT
    assert list((tmp_path / "store" / "building").iterdir()) == []
    assert held(store.get_or_build({"n": "1"}, Builder())) == CONTENT


@pytest.mark.timeout(60)
def test_a_living_build_is_not_swept(tmp_path):
    store, builds = ArtifactStore(tmp_path / "store"), []

    def outer(folder: Path) -> None:
        (folder / "a").write_bytes(b"1")
        store.get_or_build({"n": "inner"}, Builder())
        builds.append(sorted(p.name for p in folder.iterdir()))

    store.get_or_build({"n": "outer"}, outer)
    assert builds == [["a"]]


def test_an_entry_appears_all_at_once(store, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    content = {f"file{i}": b"x" * 4096 for i in range(40)}
    path, seen, over = store.root / "entries" / key_digest(KEY), set(), threading.Event()

    def watch() -> None:
        while not over.is_set():
            try:
                seen.add(len(os.listdir(path)))
            except FileNotFoundError:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    for turn in range(20):
        store.get_or_build(KEY, Builder(content))
        # Moved away whole and kept: emptied here, a listing begun before the move would count what is left.
        os.rename(path, store.root / "building" / f"gone{turn}")
    over.set()
    watcher.join()
    assert seen <= {len(content) + 2}, f"partial entries of {seen} files were visible"


def test_waiting_for_a_lock_ends(tmp_path):
    import filelock

    store = ArtifactStore(tmp_path / "store", lock_timeout=0.2)
    with (
        filelock.FileLock(store.root / "locks" / f"{key_digest(KEY)}.lock"),
        pytest.raises(StoreError, match="waited 0.2 s"),
    ):
        store.get_or_build(KEY, Builder())


def test_a_full_disk_is_one_error_and_stores_nothing(store, monkeypatch):
    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StoreError, match="No space left on device"):
            store.get_or_build(KEY, Builder())
    assert store.entries() == ()
    assert held(store.get_or_build(KEY, Builder())) == CONTENT
