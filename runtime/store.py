"""Artifact store: what was generated, compiled or converted once, kept on disk and never trusted blindly.

An entry is a folder named by the SHA-256 of its key, with a manifest of the files' hashes signed with a
secret only this user can read. Every use checks the signature, the sizes and the hashes; whatever does not
match is thrown away, built again and reported by one warning. Builds happen once however many processes ask,
and a killed build leaves nothing under an entry's name. Free of torch.

    <root>/mac.key            32 random bytes, mode 0600
    <root>/entries/<sha256>/  manifest.json, manifest.mac and the artifact's files
    <root>/building/          builds under way and leftovers, swept
    <root>/locks/             one lock file per entry
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import platformdirs

from tilewright.runtime.settings import read_settings
from tilewright.runtime.store_files import (
    EntryProblem,
    FileRecord,
    StoreError,
    check_private_folder,
    key_digest,
    load_secret,
    new_secret,
    read_manifest,
    remove,
    seal,
    signature,
    sync_folder,
    verify_entry,
)

__all__ = ["ArtifactStore", "Entry", "FieldDifference", "FileRecord", "StoreError", "key_digest"]

_log = logging.getLogger("tilewright.store")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BUILD = re.compile(r"([0-9a-f]{64})\.[0-9]+\.[0-9a-f]{8}")
_SETTLED = 0.1
"""Seconds. A file changed more recently may change again within one clock tick: its hash is not memoised."""

_memos: dict[Path, dict[str, tuple[object, ...]]] = {}
"""Per store folder: entries this process has verified, by the identity their files had then."""


class _Busy(Exception):
    """A lock is held by somebody else."""


@dataclass(frozen=True)
class Entry:
    """One stored artifact."""

    digest: str
    path: Path
    key: Mapping[str, str]
    files: Mapping[str, FileRecord]
    created: float
    """Seconds since the epoch."""

    @property
    def size(self) -> int:
        """Bytes of the artifact's files, without the manifest."""
        return sum(record.size for record in self.files.values())


@dataclass(frozen=True)
class FieldDifference:
    """A key field that kept an artifact from being found; `None` where a side lacks the field."""

    name: str
    wanted: str | None
    stored: str | None

    def __str__(self) -> str:
        return f"{self.name}: wanted {self.wanted!r}, stored {self.stored!r}"


def user_folder() -> Path:
    """Where this user's files lie: `TILEWRIGHT_CACHE`, else the platform's cache folder for this user."""
    return read_settings().cache or Path(platformdirs.user_cache_dir("tilewright", appauthor=False))


class ArtifactStore:
    """A verified, crash-safe cache of folders of files, shared by the processes and threads of one user."""

    def __init__(self, root: Path, *, lock_timeout: float = 3600.0) -> None:
        """Open or create the store at `root` (mode 0700).

        `lock_timeout`: seconds to wait for another process that builds the same entry.
        Raises StoreError when `root` is a link, foreign, writable by others or cannot be created.
        """
        self.root = Path(root).absolute()
        self._lock_timeout = lock_timeout
        self._entries, self._building, self._locks = (self.root / n for n in ("entries", "building", "locks"))
        self._memo = _memos.setdefault(self.root, {})
        with self._disk():
            self._prepare()

    @classmethod
    def default(cls) -> ArtifactStore:
        """The user's store, in `user_folder`."""
        return cls(user_folder())

    def get_or_build(self, key: Mapping[str, str], build: Callable[[Path], None]) -> Path:
        """Folder with the artifact of `key`; when absent, `build(folder)` writes its files (flat, regular).

        Concurrent callers with the same key wait for one build. A stored entry that does not verify is
        discarded with one warning and built again. Errors of `build` pass through and nothing is stored.
        Raises StoreError: nothing storable was built, the disk failed, or the lock could not be had in time.
        """
        digest = key_digest(key)
        try:
            if self._verified(digest):
                return self._entries / digest
        except EntryProblem:
            pass  # looked at again, and reported, under the lock: it may be being replaced right now
        with self._disk():
            self._prepare()
        with self._lock(digest):
            return self._build_locked(digest, dict(key), build)

    def get(self, key: Mapping[str, str]) -> Path | None:
        """Folder with the verified artifact of `key`, or None when it is absent or does not verify."""
        digest = key_digest(key)
        try:
            return self._entries / digest if self._verified(digest) else None
        except EntryProblem as problem:
            _log.warning("ignored stored artifact %s: %s", digest[:12], problem)
            return None

    def entries(self) -> tuple[Entry, ...]:
        """Every entry whose manifest is signed by this store, oldest first; file contents are not read."""
        found = []
        for digest in self._digests():
            try:
                manifest = read_manifest(self._entries / digest, digest, self._secret())
            except EntryProblem:
                continue
            found.append(
                Entry(digest, self._entries / digest, manifest.key, manifest.files, manifest.created)
            )
        return tuple(sorted(found, key=lambda entry: (entry.created, entry.digest)))

    def size(self) -> int:
        """Bytes of all listed artifacts."""
        return sum(entry.size for entry in self.entries())

    def clear(self) -> int:
        """Remove every entry and leftover; number of entries removed. Builds under way are waited for."""
        removed = 0
        with self._disk():
            for name in self._names():
                if not _DIGEST.fullmatch(name):
                    remove(self._entries / name)
                    continue
                with self._lock(name):
                    self._discard(name)
                removed += 1
            self._sweep()
        return removed

    def verify(self) -> list[str]:
        """Check every entry in full; one line per problem, empty when all is well. Removes nothing."""
        problems = []
        for name in self._names():
            if not _DIGEST.fullmatch(name):
                problems.append(f"{name[:80]!r}: not an entry of this store")
                continue
            try:
                verify_entry(self._entries / name, name, self._secret())
            except EntryProblem as problem:
                problems.append(f"{name}: {problem}")
        return problems

    def why_miss(self, key: Mapping[str, str]) -> tuple[FieldDifference, ...]:
        """The fields of `key` that differ from the nearest stored entry; empty when `key` itself is stored.

        With an empty store every field differs (`stored` is None).
        """
        best: tuple[FieldDifference, ...] | None = None
        for entry in self.entries():
            names = sorted({*key, *entry.key})
            pairs = ((name, key.get(name), entry.key.get(name)) for name in names)
            differs = tuple(FieldDifference(*pair) for pair in pairs if pair[1] != pair[2])
            if best is None or len(differs) < len(best):
                best = differs
        if best is None:
            return tuple(FieldDifference(name, value, None) for name, value in sorted(key.items()))
        return best

    def _prepare(self) -> None:
        self.root.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.root, self._entries, self._building, self._locks):
            if not os.path.lexists(folder):
                folder.mkdir(mode=0o700, exist_ok=True)
            check_private_folder(folder)

    def _verified(self, digest: str) -> bool:
        """True: there and right. False: absent. Raises EntryProblem: there and wrong."""
        path = self._entries / digest
        if not os.path.lexists(path):
            return False
        started = time.time()
        before, newest = signature(path)
        if self._memo.get(digest) == before:
            return True
        verify_entry(path, digest, self._secret())
        if newest + _SETTLED < started:
            self._memo[digest] = before
        return True

    def _build_locked(self, digest: str, key: Mapping[str, str], build: Callable[[Path], None]) -> Path:
        path, draft = self._entries / digest, self._draft(digest)
        try:
            if self._verified(digest):
                return path
        except EntryProblem as problem:
            _log.warning("stored artifact %s was discarded and is built again: %s", digest[:12], problem)
        with self._disk():
            self._discard(digest)
            self._sweep(held=digest)
            draft.mkdir(mode=0o700)
        try:
            build(draft)
            with self._disk():
                seal(draft, key, self._secret())
                os.rename(draft, path)
                sync_folder(self._entries)
        except BaseException:
            remove(draft)
            raise
        return path

    def _draft(self, digest: str) -> Path:
        return self._building / f"{digest}.{os.getpid()}.{secrets.token_hex(4)}"

    def _discard(self, digest: str) -> None:
        """Take the entry out of sight in one step, then remove it. The caller holds its lock."""
        self._memo.pop(digest, None)
        grave = self._draft(digest)
        try:
            os.rename(self._entries / digest, grave)
        except FileNotFoundError:
            return
        remove(grave)

    def _sweep(self, held: str = "") -> None:
        """Remove leftovers of killed builds: their entry is locked by nobody, or (`held`) by this caller."""
        for name in sorted(os.listdir(self._building)):
            match = _BUILD.fullmatch(name)
            if match is None or match[1] == held:
                remove(self._building / name)
                continue
            try:
                with self._lock(match[1], wait=False):
                    remove(self._building / name)
            except _Busy:
                continue  # its builder lives

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Turn the operating system's errors about the store's own files into one StoreError."""
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"store folder {self.root} cannot be used ({error.strerror or error})",
                remedy="free the disk, or set TILEWRIGHT_CACHE to a folder you can write",
            ) from error

    @contextmanager
    def _lock(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold the lock `name`; StoreError when the wait is over, `_Busy` at once when not waiting."""
        path = self._locks / f"{name}.lock"
        if path.is_symlink() or (path.exists() and not path.is_file()):
            remove(path)  # planted: a lock file is always a regular file
        lock = filelock.FileLock(path, timeout=self._lock_timeout if wait else 0.0, mode=0o600)
        try:
            lock.acquire()
        except filelock.Timeout:
            if not wait:
                raise _Busy from None
            raise StoreError(
                f"waited {self._lock_timeout:g} s for another process that holds {path}",
                remedy="end that process or raise lock_timeout",
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _secret(self) -> bytes:
        path = self.root / "mac.key"
        check_private_folder(self.root)
        try:
            return load_secret(path)
        except EntryProblem:
            pass
        with self._lock("mac-key"):
            try:
                return load_secret(path)
            except EntryProblem as problem:
                if os.path.lexists(path):
                    _log.warning(
                        "the store's key was replaced; stored artifacts are built again: %s", problem
                    )
                return new_secret(path)

    def _names(self) -> list[str]:
        return sorted(os.listdir(self._entries))

    def _digests(self) -> list[str]:
        return [name for name in self._names() if _DIGEST.fullmatch(name)]
