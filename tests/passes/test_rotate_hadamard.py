"""rotate-hadamard on whole models: exact in float64, refused where it must be, true after weights change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tilewright.compiler import Pipeline, Program, RunOptions, ops
from tilewright.compiler.diagnostics import OptionError, PipelineError
from tilewright.compiler.finite_field import ProgramFunction, prove_equal
from tilewright.compiler.float64 import Float64
from tilewright.compiler.log import Fuel
from tilewright.compiler.pipeline import run_pass
from tilewright.compiler.program import DerivedCheck
from tilewright.compiler.replay import tensors_in
from tilewright.compiler.schema import arguments
from tilewright.compiler.selftest import capture_example, run
from tilewright.frontends.api import optimize
from tilewright.frontends.capture import from_dynamo, normalize
from tilewright.frontends.loaders import resolve
from tilewright.passes.weights.rotate_hadamard import RotateHadamard
from tilewright.tools.zoo_models import entries, select

ALL = "fold-norm-scale,rotate-hadamard{r3=true}"


def captured(module, args, kwargs) -> Program:
    found: list[Program] = []

    def backend(gm, example_inputs):
        found.append(from_dynamo(gm, example_inputs))
        normalize(found[-1], RunOptions(replay=False))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend)(*args, **kwargs)
    return max(found, key=lambda p: len(p.graph.nodes))


def difference(before: Program, after: Program) -> float:
    """Largest difference of two float64 runs, relative to the largest value."""
    want = tensors_in(Float64(before).run_on(before.example_inputs))
    got = tensors_in(Float64(after).run_on(after.example_inputs))
    return max(float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True))


def rotated(program: Program, pipeline: str = ALL):
    before = program.clone()
    reports = Pipeline.parse(pipeline).run(program, RunOptions(replay=False))
    rules = [a.rule for a in reports[-1].applied]
    return before, {rule: rules.count(rule) for rule in dict.fromkeys(rules)}, reports[-1]


@pytest.fixture(scope="module")
def tiny_llama():
    model = resolve("tiny-llama")
    args, kwargs = model.example(None, length=16)
    return model, args, kwargs


def test_tied_decoder(tiny_llama):
    """SmolLM2's architecture: the table stays tied and is rotated at run time, once in and once out."""
    model, args, kwargs = tiny_llama
    program = captured(model.module, args, kwargs)
    before, rules, report = rotated(program)
    assert rules == {"r1": 1, "r2": 2, "r4": 2, "r3": 2}
    assert difference(before, program) <= 1e-10
    assert "1 values enter and 1 leave" in report.notes[0]
    online = [n for n in program.graph.nodes if n.target is ops.hadamard]
    assert len(online) == 2 + 2 + 2 * 2
    assert len(program.derived) == 14, "only the edited weights are held"
    again = run_pass(RotateHadamard(r3=True), program, RunOptions(), Fuel())
    assert not again.applied
    assert {r.reason.split(" ", 1)[1] for r in again.refused if r.rule != "r4"} >= {"is rotated already"}


def test_compiled_decoder_gives_the_same_logits(tiny_llama):
    model, args, kwargs = tiny_llama
    torch._dynamo.reset()
    with torch.no_grad():
        want = model.module(*args, **kwargs).logits
        got = optimize(model.module, args, ALL, kwargs=kwargs, lower="eager")(*args, **kwargs).logits
    assert float((got - want).abs().max()) < 2e-5 * float(want.abs().max())
    assert not torch.equal(got, want)


def test_derived_weights_follow_the_model(tiny_llama):
    model, args, kwargs = tiny_llama
    program = captured(model.module, args, kwargs)
    rotated(program)
    inputs = [v.clone() if isinstance(v, torch.Tensor) else v for v in program.example_inputs]
    program.example_inputs[:] = inputs
    check = DerivedCheck(program)
    with torch.no_grad():
        for spec, value in zip(program.inputs, inputs, strict=True):
            if "down_proj" in spec.source or "layernorm" in spec.source:
                value.mul_(1.5)
        check(inputs)
        got = tensors_in(program.module(*inputs))[0]
        fresh = captured(model.module, args, kwargs)
        want = tensors_in(fresh.module(*inputs))[0]
    assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())


QUICK = ("qwen3", "opt", "phi3")


@pytest.mark.parametrize("name", QUICK)
def test_architectures(name):
    (entry,) = select([name])
    program = captured(entry.build(), *entry.inputs())
    before, rules, _ = rotated(program)
    assert rules["r1"] == 1
    assert rules["r2"] == rules["r3"] == entry.layers
    assert difference(before, program) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("entry", entries(), ids=lambda e: e.name)
def test_zoo(entry):
    """Whatever applies is exact, whatever does not apply says why."""
    program = captured(entry.build(), *entry.inputs())
    before, rules, report = rotated(program, "fold-norm-scale,rotate-hadamard{r3=true,caches=true}")
    assert rules or report.refused or report.notes
    assert difference(before, program) <= 1e-10


@pytest.mark.slow
def test_smollm2():
    model = resolve("smollm2")
    args, kwargs = model.example(None, length=16)
    program = captured(model.module, args, kwargs)
    before, rules, _ = rotated(program, "fold-norm-scale,rotate-hadamard")
    assert rules == {"r1": 1, "r2": 30, "r4": 30}
    assert difference(before, program) <= 1e-10


@pytest.mark.parametrize("name", ["gemma2", "bert"])
def test_norms_inside_the_stream_are_refused(name):
    (entry,) = select([name])
    program = captured(entry.build(), *entry.inputs())
    before, rules, report = rotated(program)
    assert "r1" not in rules
    assert any(r.rule == "r1" and "gain" in r.reason and r.blame for r in report.refused)
    assert difference(before, program) <= 1e-10


def example(index: int):
    options, found = list(RotateHadamard.examples())[index]
    return RotateHadamard(**options), found


def test_field_proves_that_the_rotation_cancels_and_sees_one_weight_left_out():
    for index, kind in ((1, "r1"), (2, "r2")):
        value, found = example(index)
        before, after = capture_example(found), capture_example(found)
        run_pass(value, after, RunOptions(), Fuel())
        given = list(before.example_inputs)
        assert prove_equal(ProgramFunction(before), ProgramFunction(after), lambda _, g=given: list(g)), kind
        linears = [n for n in after.graph.nodes if n.target is ops.linear]
        original = [n for n in before.graph.nodes if n.target is ops.linear]
        for place, (linear, old) in enumerate(zip(linears, original, strict=True)):
            weight = arguments(linear)["weight"]
            if weight.op != "get_attr":
                continue
            plain = next(n for n in after.graph.nodes if n.name == arguments(old)["weight"].name)
            linear.replace_input_with(weight, plain)
            proof = prove_equal(
                ProgramFunction(before), ProgramFunction(after), lambda _, g=given: list(g), draws=1
            )
            assert proof.verdict == "different", (kind, place)
            linear.replace_input_with(plain, weight)


def test_seed_changes_the_signs_only():
    _, found = example(1)
    programs = [capture_example(found) for _ in range(3)]
    for program, seed in zip(programs, (0, 1, 1), strict=True):
        run_pass(RotateHadamard(r2=False, r4=False, seed=seed), program, RunOptions(), Fuel())
    buffers = [dict(p.module.named_buffers()) for p in programs]
    first = next(iter(buffers[0]))
    assert not torch.equal(buffers[0][first], buffers[1][first])
    assert all(torch.equal(a, b) for a, b in zip(buffers[1].values(), buffers[2].values(), strict=True))
    want, got = run(programs[0])[0], run(programs[1])[0]
    assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())


def test_order_and_options():
    with pytest.raises(PipelineError, match="must come after fold-norm-scale"):
        Pipeline.parse("rotate-hadamard,fold-norm-scale")
    with pytest.raises(OptionError, match="seed"):
        RotateHadamard(seed=-1)
    assert Pipeline.parse(Pipeline.parse(ALL).text()) == Pipeline.parse(ALL)


def test_without_folding_it_says_so(tiny_llama):
    model, args, kwargs = tiny_llama
    program = captured(model.module, args, kwargs)
    _, rules, report = rotated(program, "rotate-hadamard")
    assert "r1" not in rules
    assert any("put fold-norm-scale before" in r.reason for r in report.refused)


def test_training_is_skipped():
    _, found = example(0)
    program = capture_example(replace(found, training=True))
    report = run_pass(RotateHadamard(), program, RunOptions(), Fuel())
    assert "inference" in report.skipped
