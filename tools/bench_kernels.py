"""Time the generated kernels of this machine against torch and Inductor, interleaved, and print the table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from tilewright.kernels.common.bench import BenchRow
from tilewright.kernels.gated_mlp import bench as gated_mlp
from tilewright.kernels.hadamard import bench as hadamard
from tilewright.kernels.linear import bench as linear
from tilewright.kernels.paged import bench as rotate_rows
from tilewright.kernels.rms_norm import bench as rms_norm
from tilewright.kernels.table import host_target
from tilewright.runtime.contracts import Target

BENCHES: dict[str, Callable[[Target], list[BenchRow]]] = {
    "linear": linear.bench,
    "rms_norm": rms_norm.bench,
    "gated_mlp": gated_mlp.bench,
    "hadamard": hadamard.bench,
    "rotate_rows": rotate_rows.bench,
}


def line(row: BenchRow) -> str:
    """One line of the table."""
    times = f"{row.kernel_us:>10.1f} {row.kernel_gbs:>7.1f} {row.baseline_us:>12.1f} {row.ratio:>7.2f}"
    return f"{row.case:<44} {times}  {row.baseline}"


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="bench_kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", choices=sorted(BENCHES), help="only this family; may repeat")
    options = parser.parse_args(argv)
    print(f"{'kernel':<44} {'us':>10} {'GB/s':>7} {'baseline us':>12} {'ratio':>7}")
    for name in options.op or sorted(BENCHES):
        for row in BENCHES[name](host_target()):
            print(line(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
