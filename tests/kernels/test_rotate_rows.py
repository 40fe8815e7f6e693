"""rotate_rows against complex numbers turned row by row: the definition, generated C++ and Triton."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tilewright.compiler import ops
from tilewright.compiler.ops import all_ops
from tilewright.compiler.parity import assert_parity
from tilewright.frontends.api import explain
from tilewright.kernels.load import build_kernel
from tilewright.kernels.paged.call import callable_for, reason_for
from tilewright.kernels.paged.rotate_family import ROTATE_ROWS
from tilewright.kernels.table import KernelChoice, full_args, host_target, select_for_node
from tilewright.runtime.contracts import KernelKey, Refusal, Target

BOUNDS = {
    torch.float32: {"rms": 2e-7, "ulps": 16.0},
    torch.bfloat16: {"rms": 2e-3, "ulps": 1.0},
    torch.float16: {"rms": 3e-4, "ulps": 1.0},
}
F32, BF16, F16 = BOUNDS
on_cpu = pytest.mark.skipif(host_target().arch == "generic", reason="kernels need AVX2")
in_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(41)


def oracle(
    rows: torch.Tensor,
    offsets: torch.Tensor,
    pace: torch.Tensor,
    table: torch.Tensor | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """Row by row in complex128, rounded at the end."""
    pairs, heads, page = len(pace), rows.shape[1], rows.shape[2]
    batch, size = (rows.shape[0], page) if table is None else (len(table), table.shape[1] * page)
    found = torch.zeros(batch, heads, size, rows.shape[3], dtype=torch.float64)
    for b in range(batch):
        for s in range(size):
            at, slot = (b, s) if table is None else (int(table[b, s // page]), s % page)
            for h in range(heads if at >= 0 else 0):
                x = rows[at, h, slot].double().numpy()
                own = offsets[b % len(offsets), h % offsets.shape[1]]
                angle = float(own[s * len(own) // size]) * pace.double().numpy()
                ends = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
                if not interleaved:
                    ends = (slice(0, pairs), slice(pairs, 2 * pairs))
                z = (x[ends[0]] + 1j * x[ends[1]]) * np.exp(1j * angle)
                y = x.copy()
                y[ends[0]], y[ends[1]] = z.real, z.imag
                found[b, h, s] = torch.from_numpy(y)
    return found.to(rows.dtype)


def definition(*args: Any) -> torch.Tensor:
    found: torch.Tensor = all_ops()["rotate_rows"].definition(*args)
    return found


def by_table(*args: Any) -> torch.Tensor:
    """The generated C++, as a graph and as an eager caller reach it."""
    choice = select_for_node("rotate_rows", args, host_target(), training=False)
    assert isinstance(choice, KernelChoice), str(choice)
    given, _ = choice.rewrite_args(full_args("rotate_rows", args))
    found: torch.Tensor = choice.op(*given)
    assert reason_for("rotate_rows", args) == ""
    assert torch.equal(callable_for("rotate_rows", args)(*args), found)
    return found


def interpreted(*args: Any) -> torch.Tensor:
    """The generated Triton in the interpreter."""
    full = full_args("rotate_rows", args)
    shapes = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in full]
    key = ROTATE_ROWS.configure(shapes, Target("cuda", "sm_80"))
    assert isinstance(key, KernelKey), str(key)
    found: torch.Tensor = build_kernel(ROTATE_ROWS, key).op(*ROTATE_ROWS.rewrite_args(key, full))
    return found


SIDES = [
    pytest.param(definition, id="definition"),
    pytest.param(by_table, id="cpp", marks=on_cpu),
    pytest.param(interpreted, id="triton", marks=[in_interpreter, pytest.mark.interpreter]),
]


def pace_of(pairs: int) -> torch.Tensor:
    """As models hold it."""
    return 10000.0 ** (-torch.arange(pairs) / pairs)


def check(side: Callable[..., torch.Tensor], *args: Any) -> None:
    got, want = side(*args), oracle(*args)
    assert got.dtype == want.dtype
    cut = side is interpreted and want.dtype == BF16  # the interpreter cuts bits off and does not round
    assert_parity(got, want, **{**BOUNDS[want.dtype], **({"rms": 5e-3, "ulps": 2.0} if cut else {})})


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("size", "pairs", "dtype", "interleaved"),
    [
        (64, 32, F32, False), (128, 64, BF16, False), (40, 8, F32, False), (96, 16, F16, True),
        (16, 8, F32, True), (72, 17, BF16, False), (24, 1, F16, True),
    ],
)  # fmt: skip
def test_gathered_rows(side: Any, size: int, pairs: int, dtype: torch.dtype, interleaved: bool) -> None:
    """Offsets of each row, each head, each run of rows or all; far ones and negative ones."""
    rows = (4 * torch.randn(2, 3, 21, size)).to(dtype)
    for shape in ((2, 3, 21), (1, 1, 21), (2, 1, 7), (1, 3, 1)):
        check(side, rows, torch.randint(-120000, 120000, shape), pace_of(pairs), None, interleaved)
    strided = rows.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 1:19]
    check(side, strided, torch.randint(-99, 99, (2, 1, 18)), pace_of(pairs), None, interleaved)
    offsets = torch.arange(0, 1)[None, None]
    assert torch.equal(side(rows, offsets, pace_of(pairs), None, interleaved), rows), "0 moves nothing"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("size", "page", "dtype", "interleaved"),
    [(64, 8, F32, False), (24, 16, BF16, False), (16, 32, F16, True)],
)
def test_rows_in_pages(side: Any, size: int, page: int, dtype: torch.dtype, interleaved: bool) -> None:
    """Pages in any order, one of two sequences, some given up; an offset a page and an offset a row."""
    pool, pairs = (3 * torch.randn(7, 4, page, size)).to(dtype), size // 2 - 4
    wide = torch.cat([pool, pool], 1)[:, 4:]  # the pool as a slice of a larger one
    table = torch.tensor([[3, -1, 5], [5, 0, -1]], dtype=torch.int32)
    for shape in ((2, 1, 3), (1, 4, 3 * page), (2, 4, 1)):
        check(side, wide, torch.randint(-9000, 9000, shape), pace_of(pairs), table, interleaved)
    pool[1], pool[2] = float("nan"), float("nan")  # pages that no one names
    assert not bool(side(pool, torch.ones(1, 1, 1).long(), pace_of(pairs), table).isnan().any())


@pytest.mark.parametrize("side", SIDES)
def test_a_sequence_moves_as_if_it_had_stood_there(side: Any) -> None:
    """Keys embedded at 5 .. and turned by 700 are those embedded at 705 .."""
    keys, pace, at = torch.randn(1, 2, 30, 64), pace_of(32), torch.arange(30)[None, None]
    moved = side(side(keys, at + 5, pace), torch.tensor([[[700]]]), pace)
    torch.testing.assert_close(moved, side(keys, at + 705, pace), rtol=0, atol=5e-6)


@pytest.mark.parametrize("side", SIDES)
def test_nothing_to_turn(side: Any) -> None:
    table = torch.zeros(2, 0, dtype=torch.int32)
    none = torch.zeros(1, 1, 0, dtype=torch.int64)
    assert side(torch.randn(2, 3, 0, 16), none, pace_of(8)).shape == (2, 3, 0, 16)
    assert side(torch.randn(5, 3, 8, 16), none, pace_of(8), table).shape == (2, 3, 0, 16)


def test_definition_in_float64_is_exact() -> None:
    rows, offsets = torch.randn(2, 3, 21, 16).double(), torch.randint(-99, 99, (2, 3, 21))
    torch.testing.assert_close(definition(rows, offsets, pace_of(8)), oracle(rows, offsets, pace_of(8)))


ROWS, ONE = torch.zeros(2, 3, 8, 16), torch.zeros(1, 1, 1, dtype=torch.int64)


@pytest.mark.parametrize(("message", "args"), [
    ("floating of 4 axes", (ROWS.long(), ONE, pace_of(8))),
    ("pace [9] torch.float32 must be float32 [R / 2] with R = 2 to 16", (ROWS, ONE, pace_of(9))),
    ("pace [8] torch.float64 must", (ROWS, ONE, pace_of(8).double())),
    ("int64 [1 or 2, 1 or 3, L] with L a divisor of the 8 rows", (ROWS, ONE.expand(1, 1, 3), pace_of(8))),
    ("offsets [1, 2, 1]", (ROWS, ONE.expand(1, 2, 1), pace_of(8))),
    ("offsets [1, 1, 1] torch.int32", (ROWS, ONE.int(), pace_of(8))),
    ("page_table is [2, 1] torch.int64", (ROWS, ONE, pace_of(8), torch.zeros(2, 1).long())),
])  # fmt: skip
def test_a_wrong_argument_is_named(message: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="rotate_rows") as caught:
        ops.rotate_rows(*args)
    assert message in str(caught.value)


@on_cpu
def test_the_kernel_reads_nothing_outside() -> None:
    table, offsets = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 3, 8, dtype=torch.int64)
    good = (ROWS, offsets, pace_of(8), table)
    call = callable_for("rotate_rows", good)
    for message, args in (
        ("names a page", (*good[:3], table + 2)),
        ("offsets must be", (ROWS, offsets[:, :, :3], *good[2:])),
        ("offsets must be", (ROWS, offsets.int(), *good[2:])),
        ("page_table must be", (*good[:3], table.long())),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*args)


def test_what_no_kernel_takes_is_refused() -> None:
    for reason, rows, table in (
        ("float64", ROWS.double(), None),
        ("12 is not a multiple of", ROWS[..., :12], None),
        ("not contiguous", torch.zeros(2, 3, 16, 8).mT, None),
        ("pages of 7", ROWS[:, :, :7], torch.zeros(1, 1, dtype=torch.int32)),
    ):
        found = select_for_node("rotate_rows", (rows, ONE, pace_of(4), table), host_target(), training=False)
        assert isinstance(found, Refusal)
        assert reason in found.reason


@on_cpu
def test_ops_agree_with_their_fakes() -> None:
    offsets, table = torch.zeros(2, 1, 8, dtype=torch.int64), torch.tensor([[1], [0]], dtype=torch.int32)
    for args in ((ROWS, offsets, pace_of(6)), (ROWS, offsets, pace_of(6), table)):
        choice = select_for_node("rotate_rows", args, host_target(), training=False)
        assert isinstance(choice, KernelChoice), str(choice)
        given, _ = choice.rewrite_args(args)
        for op, own in ((choice.op, given), (ops.rotate_rows, args)):
            torch.library.opcheck(op, own, test_utils=("test_schema", "test_faketensor"))


def test_what_is_off_is_absent_from_the_text() -> None:
    texts = []
    for args in ROTATE_ROWS.examples():
        key = ROTATE_ROWS.configure(args, Target("cuda", "sm_80"))
        assert isinstance(key, KernelKey), str(key)
        text = ROTATE_ROWS.source(key)[1]
        ast.parse(text)
        assert ("page_table" in text) == (args[3] is not None)
        assert ("2 * i" in text) == args[4]
        texts.append(text)
    assert len(set(texts)) == len(texts)


class Moved(torch.nn.Module):
    """Keys out of a pool, each sequence as if it stood elsewhere."""

    def forward(self, pool: Any, by: Any, pace: Any, table: Any) -> Any:
        return ops.rotate_rows(pool, by[:, None, None], pace, table) * 2


@on_cpu
def test_a_compiled_graph_runs_the_kernel() -> None:
    args = torch.randn(5, 3, 8, 16), torch.tensor([40, -7]), pace_of(8), torch.tensor([[4, 0], [2, -1]]).int()
    options = {"pipeline": "exact", "lower": "eager"}
    report = explain(Moved().eval(), args, **options)
    assert [row["kernel"].startswith("rotate_rows_") for row in report.kernels] == [True]
    got = torch.compile(Moved().eval(), backend="tilewright", options=options)(*args)
    want = oracle(args[0], args[1][:, None, None], *args[2:]) * 2
    assert_parity(got, want, **BOUNDS[F32])
