"""Extents on disk: written once, checked, read past the page cache; every fault is one clear error."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading

import pytest
import torch

from tilewright.runtime.kv_store.errors import KVStoreError
from tilewright.runtime.kv_store.extents import (
    BLOCK,
    LEAST_EXTENT,
    ExtentError,
    ExtentFile,
    ExtentLayout,
    FileIO,
    aligned,
    checksum,
)
from tilewright.runtime.kv_store.links import HostExtents, SimLink
from tilewright.runtime.kv_store.transfers import Job, Ticket, TransferThreads, Urgency

SIZE = 4 * BLOCK


class FaultyIO(FileIO):
    """The system's calls, with one fault at a time."""

    def __init__(self) -> None:
        self.fault = ""
        self.calls = 0

    def pread(self, fd: int, buffer: memoryview, offset: int) -> int:
        self.calls += 1
        if self.fault == "broken":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.fault == "short":
            return super().pread(fd, buffer[:BLOCK], offset)
        if self.fault == "odd":
            read = super().pread(fd, buffer, offset)
            return BLOCK + 100 if read > BLOCK + 100 else read
        return super().pread(fd, buffer, offset)

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        self.calls += 1
        if self.fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.fault == "full halfway":
            self.fault = "full"
            return super().pwrite(fd, buffer[:BLOCK], offset)
        return super().pwrite(fd, buffer, offset)


class CachedIO(FaultyIO):
    """A file system without transfers past the page cache."""

    def past_cache(self, fd: int) -> bool:
        return False


def filled(seed: int, size: int = SIZE) -> torch.Tensor:
    data = aligned(size)
    data.copy_(torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed)))
    return data


@pytest.fixture(params=[FaultyIO, CachedIO])
def io(request):
    return request.param()


@pytest.fixture
def file(tmp_path, io):
    file = ExtentFile(tmp_path / "kv", SIZE, io)
    yield file
    file.close()


def test_round_trip_is_bitwise_and_an_unchanged_extent_is_written_once(file, io):
    first, second, out = filled(0), filled(1), aligned(SIZE)
    assert file.write("a", 1, first)
    assert file.write("b", 1, second)
    calls = io.calls
    assert not file.write("a", 1, second)
    assert io.calls == calls
    file.read("a", out)
    assert torch.equal(out, first)
    assert file.write("a", 2, second)
    file.read("a", out)
    assert torch.equal(out, second)
    assert file.disk_bytes == 2 * SIZE
    file.drop("a")
    assert file.write("c", 1, first)
    assert file.disk_bytes == 2 * SIZE
    with pytest.raises(ExtentError, match="extent a is not on disk"):
        file.read("a", out)


def test_no_name_and_no_descriptor_stays_behind(tmp_path):
    def open_files():
        """Those of this test: other threads of the process open some of their own."""
        found = 0
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed since
                found += os.readlink(f"/proc/self/fd/{number}").startswith(str(tmp_path))
        return found

    for _ in range(1000):
        file = ExtentFile(tmp_path / "kv", SIZE)
        file.write("a", 1, SOME)
        assert open_files() == 1
        file.close()
    assert os.listdir(tmp_path / "kv") == []
    assert open_files() == 0


def test_the_folder_is_private(tmp_path):
    ExtentFile(tmp_path / "kv", SIZE).close()
    assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "kv")
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for name, reason in (
        ("link", "cannot be used"),
        ("file", "cannot be used"),
        ("open", "others can write it"),
    ):
        with pytest.raises(ExtentError, match=reason):
            ExtentFile(tmp_path / name, SIZE)


@pytest.mark.parametrize("fault", ["short", "odd"])
def test_a_short_read_is_continued(file, io, fault):
    data, out = filled(2), aligned(SIZE)
    file.write("a", 1, data)
    io.fault, io.calls = fault, 0
    file.read("a", out)
    assert torch.equal(out, data)
    assert io.calls > 1


def test_a_truncated_file_is_an_error(file, io):
    file.write("a", 1, filled(3))
    for length in (SIZE - BLOCK, SIZE - 100, 0):
        os.ftruncate(file._fd, length)
        with pytest.raises(ExtentError, match=f"short, .* of {SIZE} bytes"):
            file.read("a", aligned(SIZE))


@pytest.mark.parametrize("place", [0, BLOCK - 1, SIZE // 2 + 5, SIZE - 1])
def test_a_changed_byte_is_an_error(file, io, place):
    data = filled(4)
    file.write("a", 1, data)
    data[place] ^= 1
    FileIO.pwrite(io, file._fd, memoryview(data.numpy()), 0)
    with pytest.raises(ExtentError, match="other bytes than were written"):
        file.read("a", aligned(SIZE))


def test_swapped_blocks_and_words_change_the_checksum():
    data = filled(5)
    for step in (8, BLOCK):
        swapped = data.clone()
        swapped[:step], swapped[step : 2 * step] = data[step : 2 * step], data[:step]
        assert checksum(swapped) != checksum(data)


@pytest.mark.parametrize("fault", ["full", "full halfway"])
def test_a_full_disk_is_an_error_and_memory_is_intact(file, io, fault):
    data = filled(6)
    kept, out = data.clone(), aligned(SIZE)
    file.write("b", 1, filled(7))
    io.fault = fault
    with pytest.raises(ExtentError, match="the disk is full"):
        file.write("a", 1, data)
    assert torch.equal(data, kept)
    with pytest.raises(ExtentError, match="not on disk"):
        file.read("a", out)
    io.fault = ""
    assert file.write("a", 1, data)
    file.read("a", out)
    assert torch.equal(out, kept)
    file.read("b", out)
    assert torch.equal(out, filled(7))


def test_a_broken_disk_names_the_reason(file, io):
    file.write("a", 1, filled(8))
    io.fault = "broken"
    with pytest.raises(ExtentError, match=f"reading an extent of {SIZE} bytes: Input/output error"):
        file.read("a", aligned(SIZE))


def test_misuse_is_refused(tmp_path, file):
    for size in (0, BLOCK + 1):
        with pytest.raises(KVStoreError, match=f"extent_bytes = {size}"):
            ExtentFile(tmp_path / "kv", size)
    for data in (aligned(2 * SIZE), aligned(SIZE + 1)[1:], aligned(SIZE).view(torch.float32)):
        with pytest.raises(KVStoreError, match="an extent is uint8"):
            file.write("a", 1, data)
    file.close()
    with pytest.raises(ExtentError, match="closed"):
        file.write("a", 1, filled(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_packs_pages_of_a_layer(dtype):
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(40, 3, 16, size, generator=generator).to(dtype) for size in (64, 32))
    layout = ExtentLayout.of(k, v)
    assert layout.used_bytes >= LEAST_EXTENT
    assert (layout.pages - 1) * layout.used_bytes // layout.pages < LEAST_EXTENT
    assert layout.extent_bytes % BLOCK == 0
    extent, pages = aligned(layout.extent_bytes), [7, 3, 39]
    layout.pack(k, v, pages, extent)
    k_view, v_view = layout.views(extent)
    assert torch.equal(k_view[:3], k[pages])
    assert torch.equal(v_view[:3], v[pages])
    assert k_view.data_ptr() == extent.data_ptr()
    others = torch.zeros_like(k), torch.zeros_like(v)
    layout.unpack(extent, *others, [1, 0, 2])
    assert torch.equal(others[0][[1, 0, 2]], k[pages])
    assert torch.equal(others[1][[1, 0, 2]], v[pages])
    with pytest.raises(KVStoreError, match="holds 1 to"):
        layout.pack(k, v, [0] * (layout.pages + 1), extent)
    with pytest.raises(KVStoreError, match="of one type"):
        ExtentLayout.of(k, v[:, :1])


def test_urgent_transfers_overtake_and_errors_come_to_the_waiter():
    order: list[str] = []
    gate = threading.Event()
    threads = TransferThreads(1)
    blocker = Job(gate.wait)
    threads.submit([(blocker, Urgency.PREFETCH)])
    jobs = {name: Job(lambda name=name: order.append(name)) for name in ("early", "late", "urgent")}
    for name in ("early", "late"):
        threads.submit([(jobs[name], Urgency.PREFETCH)])
    threads.submit([(jobs["urgent"], Urgency.DEMAND)])
    threads.submit([(jobs["late"], Urgency.DEMAND)])
    with pytest.raises(KVStoreError, match=r"more than 0\.01 s"):
        Ticket([blocker]).wait(0.01)
    gate.set()
    Ticket(list(jobs.values())).wait(10)
    assert order == ["urgent", "late", "early"]

    def fail() -> None:
        raise ValueError("a defect")

    bad = Job(fail)
    threads.submit([(bad, Urgency.DEMAND)])
    with pytest.raises(ValueError, match="a defect"):
        Ticket([bad]).wait(10)
    threads.close()
    with pytest.raises(KVStoreError, match="closed"):
        threads.submit([(Job(gate.wait), Urgency.DEMAND)])


def test_who_waits_does_what_no_thread_has_begun():
    gate = threading.Event()
    threads = TransferThreads(1)
    blocker, ran = Job(gate.wait), []
    threads.submit([(blocker, Urgency.DEMAND)])
    job = Job(lambda: ran.append(threading.current_thread()))
    threads.submit([(job, Urgency.DEMAND)])
    Ticket([job]).wait()
    assert ran == [threading.current_thread()]
    gate.set()
    threads.close()
    assert len(ran) == 1


def test_memory_tiers_keep_versions_and_the_link_takes_its_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tilewright.runtime.kv_store.links.time.monotonic", lambda: now[0])
    slept: list[float] = []
    monkeypatch.setattr("tilewright.runtime.kv_store.links.time.sleep", slept.append)
    link = SimLink(bandwidth=SIZE / 2.0, latency=0.5)
    data, out = filled(9), aligned(SIZE)
    for store in (HostExtents(), link):
        assert store.write("a", 1, data)
        assert not store.write("a", 1, data)
        store.read("a", out)
        assert torch.equal(out, data)
        store.drop("a")
        with pytest.raises(ExtentError, match="not in the slow tier"):
            store.read("a", out)
    # The clock stands still: the read waits for the link behind the write.
    assert slept == [2.5, 4.5]
    assert "emulated" in link.label
    for bandwidth, latency in ((0.0, 0.0), (1.0, -1.0), (float("nan"), 0.0)):
        with pytest.raises(KVStoreError, match="expected"):
            SimLink(bandwidth, latency)
        with pytest.raises(KVStoreError, match="expected"):
            link.throttle(bandwidth, latency)
    link.write("a", 2, data)
    link.throttle(SIZE / 8.0, 0.0)
    link.read("a", out)
    # A read that failed has taken its two seconds too.
    assert slept[2:] == [8.5, 16.0], "slower from then on, and what it holds stays"


SOME = filled(10)
