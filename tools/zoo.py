"""Survey of the model zoo: what is captured, recognised, right and fast.

`python -m tilewright.tools.zoo [NAMES] [--json FILE] [--backend tilewright|eager] [--lower inductor|eager]
[--no-kernels] [--inductor] [--list] [--jobs N]`. Exit status: 0 when no model crashed or is wrong, 1 when one
did, 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tilewright.tools.zoo_entry import ZooEntry
from tilewright.tools.zoo_measure import Row, Settings, measure
from tilewright.tools.zoo_models import FAMILIES, select


def measure_named(name: str, settings: Settings, threads: int) -> Row:
    """Measure one entry in this process; runs in a worker."""
    import torch

    torch.set_num_threads(threads)
    (entry,) = [e for e in select([]) if e.name == name]
    return measure(entry, settings)


def survey(
    chosen: Sequence[ZooEntry], jobs: int, task: Callable[[str], Row], done: Callable[[Row], None]
) -> list[Row]:
    """Rows `task(name)` in the order of `chosen`; `done` is called as each arrives.

    Each job owns one worker process, so that a model which kills its process costs one row, not the survey.
    """
    waiting: queue.Queue[int] = queue.Queue()
    for i in range(len(chosen)):
        waiting.put(i)
    rows: dict[int, Row] = {}
    lock = threading.Lock()

    def serve() -> None:
        worker = _worker()
        while True:
            try:
                i = waiting.get_nowait()
            except queue.Empty:
                break
            entry = chosen[i]
            try:
                row = worker.submit(task, entry.name).result()
            except BrokenProcessPool:
                row = Row(entry.name, entry.family, entry.layers, dict(entry.expected))
                row.crash = "the process died (signal, or out of memory)"
                worker = _worker()
            with lock:
                rows[i] = row
                done(row)
        worker.shutdown()

    servers = [threading.Thread(target=serve) for _ in range(min(jobs, len(chosen)))]
    for server in servers:
        server.start()
    for server in servers:
        server.join()
    return [rows[i] for i in range(len(chosen))]


def _worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))


def ops_cell(row: Row) -> str:
    """`all 43`, or only the ops whose number differs: `rope 2/4`."""
    if row.found is None:
        return "-"
    if not row.missing:
        return f"all {sum(row.expected.values())}"
    return ", ".join(f"{op} {found}/{expected}" for op, (found, expected) in row.missing.items())


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def verdict(row: Row) -> str:
    """`ok`, `crash` or `wrong`."""
    return "crash" if row.crash else "wrong" if row.wrong else "ok"


def table(rows: Sequence[Row]) -> Table:
    """One line per model."""
    out = Table(title="Model zoo", title_justify="left")
    for column in ("model", "layers", "capture", "ops found", "eager", "ours", "s", "Ind. s", ""):
        out.add_column(column, overflow="fold", no_wrap=column in ("model", "eager", "ours"))
    for row in rows:
        captured = "whole" if row.whole else f"{row.graphs} parts"
        out.add_row(
            row.name,
            str(row.layers),
            "-" if row.crash else captured,
            ops_cell(row),
            _error(row.error_eager),
            _error(row.error_ours),
            _seconds(row.seconds),
            _seconds(row.seconds_inductor),
            verdict(row),
            style="red" if not row.good else "",
        )
    return out


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Totals of a survey."""
    recognised = [row for row in rows if row.found is not None]
    return {
        "models": len(rows),
        "whole": sum(row.whole for row in rows),
        "crashed": [row.name for row in rows if row.crash],
        "wrong": [row.name for row in rows if row.wrong],
        "fully_recognised": sum(not row.missing for row in recognised),
        "recognised_of": len(recognised),
        "graph_breaks": {row.name: row.breaks for row in rows if row.breaks},
    }


def write_json(path: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Write the survey through a temporary sibling, so that the file is whole or absent."""
    import torch

    data = {
        "settings": vars(settings),
        "torch": torch.__version__,
        "summary": summary(rows),
        "rows": [row.to_dict() for row in rows],
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m tilewright.tools.zoo", description=__doc__.split("\n")[0])
    out.add_argument("names", nargs="*", help=f"models or families ({', '.join(FAMILIES)}); all when none")
    out.add_argument("--json", type=Path, metavar="FILE", help="write every row as JSON")
    out.add_argument("--backend", choices=("tilewright", "eager"), default="tilewright")
    out.add_argument("--pipeline", default="exact", help="pipeline text (default: exact)")
    out.add_argument("--lower", choices=("inductor", "eager"), default="inductor", help="what runs the rest")
    out.add_argument("--no-kernels", action="store_true", help="run semantic ops as their definitions")
    out.add_argument("--inductor", action="store_true", help="time Inductor's compilation as well")
    out.add_argument("--list", action="store_true", help="print the entries and stop")
    out.add_argument("--jobs", type=int, default=1, metavar="N", help="worker processes (default: 1)")
    return out


def print_list(chosen: Sequence[ZooEntry], console: Console) -> None:
    """Names, families and expected ops."""
    out = Table()
    for column in ("model", "family", "layers", "expected"):
        out.add_column(column)
    for entry in chosen:
        expected = ", ".join(f"{op} {n}" for op, n in entry.expected.items() if n)
        out.add_row(entry.name, entry.family, str(entry.layers), expected)
    console.print(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the survey; returns the exit status."""
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.jobs < 1:
        arguments.error(f"--jobs {args.jobs}: expected 1 or more")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        arguments.error(f"--json {args.json}: its folder does not exist")
    try:
        chosen = select(args.names)
    except ValueError as error:
        arguments.error(str(error))
    console = Console()
    if args.list:
        print_list(chosen, console)
        return 0
    settings = Settings(args.backend, args.pipeline, args.lower, not args.no_kernels, args.inductor)

    def progress(row: Row) -> None:
        print(f"{row.name}: {verdict(row)}", file=sys.stderr, flush=True)

    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    task = partial(measure_named, settings=settings, threads=threads)
    rows = survey(chosen, args.jobs, task, progress)
    console.print(table(rows))
    for row in rows:
        for found in row.breaks:
            console.print(f"{row.name}: graph break at {found['line']}: {found['reason']}", markup=False)
        if not row.good:
            console.print(f"{row.name}: {verdict(row)}: {row.crash or row.wrong}", markup=False)
    if args.json is not None:
        write_json(args.json, rows, settings)
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
