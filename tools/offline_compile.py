"""Compile every generated Triton kernel for every GPU target, without one, and print what each would use.

Exit status 1 when a default configuration spills registers or does not fit a target's shared memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tilewright.kernels.common.family import KernelFamily, config_of
from tilewright.kernels.load import store_triton_source
from tilewright.kernels.table import FAMILIES, full_args
from tilewright.runtime.contracts import KernelKey, Refusal, Target
from tilewright.runtime.offline import TARGETS, Resources, compile_offline


@dataclass(frozen=True)
class Row:
    """One kernel on one target."""

    kernel: str
    target: Target
    used: Resources

    @property
    def complaint(self) -> str:
        """Why the default configuration is not acceptable, empty when it is."""
        if self.used.spill_bytes > 0:
            return "spills"
        return "too much shared memory" if self.used.over_limit(self.target) else ""


def default_keys(family: KernelFamily, target: Target) -> Iterator[tuple[KernelKey, int]]:
    """(key, size of the last axis) of the configurations a resource table shows; none where it has none."""
    shown = family.triton is not None and target.arch in family.archs
    for args in family.examples() if shown else ():
        key = family.configure(full_args(family.op, args), target)
        if isinstance(key, Refusal):
            raise ValueError(f"example of {family.op} on {target}: {key}")
        yield key, args[0].shape[-1]


def describe(key: KernelKey) -> str:
    """The kernel and what specialises it."""
    hidden = ("residual", "streams", "out")
    options = [f"{k}={v}" for k, v in config_of(key).items() if k not in hidden and v is not False]
    return f"{key.op} {key.dtype} {' '.join(options)}"


def compile_row(family: KernelFamily, key: KernelKey, columns: int) -> Row:
    """Generate, store and compile one kernel for the target of its key."""
    assert family.triton is not None, "a GPU key comes from a family with Triton sources"
    name, text = family.source(key)
    used = compile_offline(
        store_triton_source(name, text),
        name,
        dict(family.triton.parameters(key)),
        family.triton.constants(key, columns),
        key.target,
        **family.triton.launch_options(key, columns),
    )
    return Row(describe(key), key.target, used)


def rows(ops: list[str], archs: list[str]) -> Iterator[Row]:
    """The table, kernel by kernel."""
    for op in ops:
        for target in TARGETS:
            if target.arch in archs:
                for key, columns in default_keys(FAMILIES[op], target):
                    yield compile_row(FAMILIES[op], key, columns)


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 when a row is not acceptable."""
    parser = argparse.ArgumentParser(prog="offline_compile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", choices=sorted(FAMILIES), help="only this op; may repeat")
    archs = [target.arch for target in TARGETS]
    parser.add_argument("--arch", action="append", choices=archs, help="only this target; may repeat")
    options = parser.parse_args(argv)
    bad = 0
    print(f"{'kernel':<72} {'target':<12} {'regs':>5} {'spill B':>8} {'stack B':>8} {'shared B':>9}")
    for row in rows(options.op or sorted(FAMILIES), options.arch or archs):
        used = row.used
        figures = f"{used.registers:>5} {used.spill_bytes:>8} {used.stack:>8} {used.shared_bytes:>9}"
        print(f"{row.kernel:<72} {row.target!s:<12} {figures}  {row.complaint}".rstrip(), flush=True)
        bad += bool(row.complaint)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
