"""Devices as data: peak arithmetic, memory bandwidth and launch cost, and the roofline time they imply."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType

import torch

from tilewright.compiler.diagnostics import OptionError, nearest

_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


@dataclass(frozen=True)
class DeviceDescriptor:
    """What a roofline needs to know about a device."""

    name: str
    peak_flops: Mapping[str, float]
    """Dense peak in flop/s by torch dtype name; a multiply-add counts 2. `float32` is always there."""
    bandwidth_gbs: float
    """Main memory read bandwidth, 1e9 bytes/s."""
    launch_us: float
    """Time one kernel or op call costs at the least. Not a vendor's figure: our assumption, or measured."""
    memory_bytes: int
    origin: str
    """Where the figures come from."""

    def peak(self, dtype: str) -> float:
        """Peak flop/s; a dtype without a unit of its own (integers, bf16 on old CPUs) takes float32's."""
        return self.peak_flops.get(dtype, self.peak_flops["float32"])


def _device(
    name: str, tera: dict[str, float], gbs: float, launch_us: float, memory: float, origin: str
) -> DeviceDescriptor:
    """A descriptor from Tflop/s by dtype (`float8` stands for all its forms), GB/s, us and 1e9 bytes."""
    peaks = {dtype: value * 1e12 for dtype, value in tera.items() if dtype != "float8"}
    if "float8" in tera:
        peaks.update(dict.fromkeys(_FLOAT8, tera["float8"] * 1e12))
    return DeviceDescriptor(name, MappingProxyType(peaks), gbs, launch_us, int(memory * 1e9), origin)


# Dense rates without structured sparsity, boost clock. float32 is the plain unit: torch leaves TF32 off.
_TABLE = (
    _device(
        "a100",
        {"float64": 9.7, "float32": 19.5, "bfloat16": 312, "float16": 312, "int8": 624},
        2039,
        3.0,
        80,
        "NVIDIA A100 80GB SXM data sheet; launch time assumed",
    ),
    _device(
        "l40s",
        {"float64": 1.4, "float32": 91.6, "bfloat16": 362.05, "float16": 362.05, "float8": 733, "int8": 733},
        864,
        3.0,
        48,
        "NVIDIA L40S data sheet; launch time assumed",
    ),
    _device(
        "h100",
        {"float64": 34, "float32": 67, "bfloat16": 989.4, "float16": 989.4, "float8": 1978.9, "int8": 1978.9},
        3350,
        3.0,
        80,
        "NVIDIA H100 SXM5 data sheet; launch time assumed",
    ),
    _device(
        "b200",
        {"float64": 37, "float32": 75, "bfloat16": 2250, "float16": 2250, "float8": 4500, "int8": 4500},
        8000,
        3.0,
        180,
        "NVIDIA HGX B200 data sheet, per GPU; launch time assumed",
    ),
    _device(
        "rtx5090",
        {"float64": 1.64, "float32": 104.8, "bfloat16": 209.5, "float16": 209.5, "float8": 419, "int8": 838},
        1792,
        3.0,
        32,
        "NVIDIA RTX Blackwell architecture paper, RTX 5090, float32 accumulation; launch time assumed",
    ),
    _device(
        "mi300x",
        {
            "float64": 81.7,
            "float32": 163.4,
            "bfloat16": 1307.4,
            "float16": 1307.4,
            "float8": 2614.9,
            "int8": 2614.9,
        },
        5300,
        5.0,
        192,
        "AMD Instinct MI300X data sheet; launch time assumed",
    ),
    _device(
        "mi355x",
        {
            "float64": 78.6,
            "float32": 157.3,
            "bfloat16": 2516.6,
            "float16": 2516.6,
            "float8": 5033.2,
            "int8": 5033.2,
        },
        8000,
        5.0,
        288,
        "AMD Instinct MI355X data sheet; launch time assumed",
    ),
    _device(
        "cpu-avx2",
        {"float64": 0.04, "float32": 0.08},
        25,
        1.0,
        16,
        "assumed: 2 cores at 2.5 GHz, one 256-bit multiply-add per cycle each, two memory channels",
    ),
)

DEVICES: Mapping[str, DeviceDescriptor] = MappingProxyType({device.name: device for device in _TABLE})
_OTHER_NAMES = {
    "sm_80": "a100",
    "sm_89": "l40s",
    "sm_90": "h100",
    "sm_100": "b200",
    "sm_120": "rtx5090",
    "gfx942": "mi300x",
    "gfx950": "mi355x",
}


def device_named(name: str) -> DeviceDescriptor:
    """The descriptor of a device by name or by architecture (`sm_90`); `host` measures this machine.

    Raises OptionError with the nearest known name.
    """
    if name == "host":
        return measure_host()
    found = DEVICES.get(_OTHER_NAMES.get(name, name))
    if found is None:
        raise OptionError(
            f"device {name!r} is unknown", remedy=nearest(name, [*DEVICES, *_OTHER_NAMES, "host"])
        )
    return found


def roofline_us(
    flops: float, bytes_moved: float, launches: int, dtype: str, device: DeviceDescriptor
) -> float:
    """Lower bound of the time in microseconds: the slower of arithmetic and memory, and the launches.

    One number for `launches` kernels that do `flops` operations in `dtype` and move `bytes_moved` in all.
    """
    arithmetic = flops / device.peak(dtype)
    memory = bytes_moved / (device.bandwidth_gbs * 1e9)
    return max(arithmetic, memory) * 1e6 + launches * device.launch_us


def _best(run: Callable[[], object], budget: float) -> float:
    """Least wall seconds of one run among all that fit into `budget` seconds, after one run to warm up.

    Many short runs, so that one of them meets a moment when other work leaves the cores alone.
    """
    run()
    best, end = math.inf, time.perf_counter() + budget
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best


_PIECE = 8 * 2**20


@cache
def measure_host() -> DeviceDescriptor:
    """Measure this machine through torch in under half a second, once a process.

    Arithmetic: a matrix product per dtype on one thread, times torch's threads; one thread, because two that
    wait for each other measure the other work on the machine. Bandwidth: the best of summing and copying
    8 MiB pieces of a 96 MiB tensor in turn (bytes read and written counted), on one thread or on all. Launch:
    one addition of two scalars. What torch reaches lies below the physical peak.
    """
    threads = torch.get_num_threads()
    pieces = itertools.cycle(torch.ones(12, _PIECE // 4))
    sweeps = (lambda: next(pieces).sum(), lambda: next(pieces).copy_(next(pieces)))
    with torch.no_grad():
        rates = [_PIECE * n / _best(sweep, 0.05) for n, sweep in enumerate(sweeps, 1)]
        torch.set_num_threads(1)
        try:
            rates += [_PIECE * n / _best(sweep, 0.05) for n, sweep in enumerate(sweeps, 1)]
            rows = ((torch.float64, 64), (torch.float32, 128), (torch.bfloat16, 8))
            peaks = {_name(dtype): _product_flops(dtype, n) * threads for dtype, n in rows}
            one = torch.ones(())
            call = _best(partial(torch.add, one, one), 0.01)
        finally:
            torch.set_num_threads(threads)
    return DeviceDescriptor(
        "host",
        MappingProxyType(peaks),
        max(rates) / 1e9,
        call * 1e6,
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "measured through torch",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _product_flops(dtype: torch.dtype, rows: int) -> float:
    """Flop/s of a [rows, 512] x [512, 256] product."""
    a, b = torch.ones(rows, 512, dtype=dtype), torch.ones(512, 256, dtype=dtype)
    return 2 * rows * 512 * 256 / _best(partial(torch.mm, a, b), 0.04)
