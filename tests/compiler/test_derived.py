"""Derived buffers whose values are made when something reads them, and not where nothing does."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from tilewright.compiler import Example, Tensor, ops
from tilewright.compiler.paging import page_out
from tilewright.compiler.pipeline import Pipeline, RunOptions
from tilewright.compiler.program import Program
from tilewright.compiler.selftest import capture_example


def _lazily(asked: list[torch.dtype], rows: int = 4) -> tuple[Program, fx.Node, fx.Node, fx.Node]:
    """A program that reads w, with w + w derived from it, and -(w + w) derived from that."""
    inputs = (Tensor(2, 32), Tensor(rows, 32, weight=True))
    program = capture_example(Example(ops.linear, inputs))
    weight = next(n for n in program.graph.nodes if program.is_weight(n))

    def twice(value: torch.Tensor) -> torch.Tensor:
        asked.append(value.dtype)
        return value + value

    first = program.derive("twice", (weight,), twice, like=weight)
    return program, weight, first, program.derive("minus", (first,), torch.neg, like=first)


def test_values_are_made_when_they_are_read() -> None:
    asked: list[torch.dtype] = []
    program, weight, first, second = _lazily(asked)
    assert asked == []
    for node in (first, second):
        assert (tuple(node.meta["val"].shape), node.meta["val"].dtype) == ((4, 32), torch.float32)
    want = program.tensor_of(weight) * 2
    assert torch.equal(program.tensor_of(first), want)
    assert program.tensor_of(first) is program.tensor_of(first)
    assert torch.equal(program.tensor_of(second), -want)
    assert asked == [torch.float32, torch.float64], "once for itself, once in the chain"


def test_what_nothing_reads_is_never_made() -> None:
    asked: list[torch.dtype] = []
    program, weight, _, second = _lazily(asked)
    weight.replace_all_uses_with(second)
    program.drop_unread()
    assert len(program.derived) == 1
    program.settle()
    program.module.recompile()
    assert asked == [torch.float64]
    x, w = program.example_inputs
    torch.testing.assert_close(program.module(x, w), torch.nn.functional.linear(x, -2 * w))


def test_a_scratch_file_holds_what_is_made(tmp_path) -> None:
    program, _, first, second = _lazily([], rows=1024)
    program.scratch = tmp_path
    assert page_out(program.tensor_of(first))
    program.settle()
    assert torch.equal(program.tensor_of(second), -program.tensor_of(first))
    assert page_out(program.tensor_of(second))
    assert program.clone().scratch == tmp_path


def _normed() -> Program:
    x, gain, w = Tensor(2, 64), Tensor(64, weight=True), Tensor(8, 64, weight=True)
    return capture_example(Example(lambda x, g, w: ops.linear(ops.rms_norm(x, g, 1e-6), w), (x, gain, w)))


@pytest.mark.parametrize("quantized", [False, True])
def test_a_pipeline_leaves_nothing_to_be_made(quantized: bool) -> None:
    program = _normed()
    quantize = ",quantize-linear{weight=int8,head=true}" if quantized else ""
    Pipeline.parse(f"fold-norm-scale{quantize}").run(program, RunOptions(verify="shapes"))
    assert [b.dtype for b in program.module._buffers.values()] == [
        torch.uint8 if quantized else torch.float32
    ], "the folded weight is dropped once it is packed"
    assert not any(b.is_meta for b in program.module._buffers.values())


def test_a_pass_that_fails_leaves_what_was_to_be_made() -> None:
    want, program = _normed(), _normed()
    Pipeline.parse("fold-norm-scale").run(want)
    quantize = "quantize-linear{weight=int4,rounding=gptq,calibration=nowhere,head=true}"
    with pytest.raises(Exception, match="nowhere"):
        Pipeline.parse(f"fold-norm-scale,{quantize}").run(program)
    assert torch.equal(*(p.module.get_buffer(p.derived[0].name) for p in (want, program)))
    program.module.recompile()
    want.module.recompile()
    given = program.example_inputs
    assert torch.equal(program.module(*given), want.module(*given))
