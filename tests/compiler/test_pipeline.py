"""Pipelines: text, order, slots, fuel, rollback, the verifier's rules and the replay of each rewrite."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tilewright.compiler import (
    Exactness,
    Example,
    GraphPass,
    Rewrite,
    Stage,
    Tensor,
    graph_pass,
    registry,
    rewrite_pass,
)
from tilewright.compiler import verify as verifier
from tilewright.compiler.admission import unchecked
from tilewright.compiler.diagnostics import OptionError, PipelineError, VerifyError
from tilewright.compiler.graph_text import print_graph
from tilewright.compiler.log import Fuel
from tilewright.compiler.pipeline import Pipeline, RunOptions, run_pass
from tilewright.compiler.selftest import capture_example

aten = torch.ops.aten
PASSES = registry.load_all()


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """Passes declared inside a test are forgotten after it, and may be wrong: what catches them is tested."""
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    with unchecked():
        yield


def sine_pass(name, *, new=lambda x: -torch.sin(-x), stage=Stage.ATTENTION, **options):
    """A pass that rewrites sin(x) to new(x)."""

    @rewrite_pass(name, stage=stage, exactness=options.pop("exactness", Exactness.BITWISE), **options)
    class Sine(Rewrite):
        """rewrite: sin(x) -> new(x)"""

        @staticmethod
        def pattern(x):
            return aten.sin(x)

        def replacement(self, x):
            return new(x)

        @classmethod
        def examples(cls):
            yield {}, Example(torch.sin, (Tensor(3),))

    return Sine


def cosine(x):
    return torch.cos(x - torch.pi / 2)


def sines(count):
    """A program of `count` sines of different values."""

    def model(x):
        for i in range(count):
            x = torch.sin(x + float(i + 1))
        return x

    return capture_example(Example(model, (Tensor(2, 3),)))


def count(program, op):
    return sum(n.target is op for n in program.graph.nodes)


# Text.


def option_values(kind):
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(1, 1 << 40)
    if kind is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if kind is str:
        return st.from_regex(r"[a-z][a-z0-9._-]{0,8}", fullmatch=True)
    if kind == tuple[int, ...]:
        return st.lists(st.integers(0, 99), max_size=4).map(tuple)
    if get_origin(kind) is tuple:
        return st.tuples(*[option_values(k) for k in get_args(kind)])
    if kind == (int | None):
        return st.none() | st.integers(1, 1 << 40)
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    raise NotImplementedError(f"draw options of type {kind}")


@st.composite
def pipelines(draw):
    """Real passes in a legal order with drawn options."""
    names = draw(st.lists(st.sampled_from(sorted(PASSES)), max_size=8))
    values = []
    for name in sorted(names, key=lambda n: PASSES[n].stage):
        hints = get_type_hints(PASSES[name])
        options = {f.name: draw(option_values(hints[f.name])) for f in dataclasses.fields(PASSES[name])}
        with contextlib.suppress(OptionError):  # a combination that the pass refuses
            values.append(PASSES[name](**options))
    try:
        return Pipeline(values)
    except PipelineError:  # a pass that has to stand behind another one
        assume(False)


@settings(max_examples=40, deadline=None)
@given(pipelines())
def test_text_round_trips(pipeline):
    again = Pipeline.parse(pipeline.text())
    assert again == pipeline
    assert hash(again) == hash(pipeline)
    assert again.text() == pipeline.text()
    spaced = pipeline.text().replace(",", " , ").replace("{", "{ ").replace("=", " = ")
    assert Pipeline.parse(spaced) == pipeline


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tile=st.tuples(*[st.integers(-9, 1 << 40)] * 3),
    sizes=st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    budget=st.none() | st.integers(),
    kind=st.sampled_from(["int4", "int8"]),
    on=st.booleans(),
    word=st.from_regex(r"[a-z][a-z0-9._-]{0,8}", fullmatch=True),
)
def test_every_kind_of_option_round_trips(tile, sizes, ratio, budget, kind, on, word):
    @graph_pass("all-options", stage=Stage.LOWER, exactness=Exactness.BITWISE)
    class AllOptions(GraphPass):
        """rewrite: x -> x"""

        tile: tuple[int, int, int] = (1, 2, 3)
        sizes: tuple[int, ...] = (1,)
        ratio: float = 0.5
        budget: int | None = 4
        kind: Literal["int4", "int8"] = "int4"
        on: bool = False
        word: str = "plain"

        def apply(self, program, log):
            log.finish(())

        @classmethod
        def examples(cls):
            yield {}, Example(torch.sin, (Tensor(3),))

    AllOptions.__annotations__ = {
        "tile": tuple[int, int, int], "sizes": tuple[int, ...], "ratio": float, "budget": int | None,
        "kind": Literal["int4", "int8"], "on": bool, "word": str,
    }  # fmt: skip
    value = AllOptions(tile=tile, sizes=sizes, ratio=ratio, budget=budget, kind=kind, on=on, word=word)
    assert Pipeline.parse(value.text()) == Pipeline([value])


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab-c{}=,x1 \n", max_size=30))
def test_any_text_parses_or_says_why(text):
    try:
        pipeline = Pipeline.parse(text)
    except (PipelineError, OptionError) as error:
        said = error.line()
    else:
        said = "nothing"
        assert pipeline.text() == "" == text.strip()
    assert said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dead-cod", "did you mean 'dead-code'"),
        ("Dead-code", "column 1"),
        ("dead-code,", "ends with ','"),
        ("dead-code,,dead-code", "column 11"),
        ("dead-code dead-code", "expected ',' at column 11"),
        ("fold-constants{max_elements=3", "never closed"),
        ("fold-constants{max_elements}", "option=value"),
        ("fold-constants{max_elements=1,max_elements=2}", "twice"),
        ("exactt", "did you mean 'exact'"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(PipelineError, match=message):
        Pipeline.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dead-code{fast=true}", "dead-code has no option 'fast'"),
        ("fold-constants{max_element=3}", "did you mean 'max_elements'"),
        ("fold-constants{max_elements=many}", "'max_elements' = 'many': expected an integer"),
        ("fold-constants{max_elements=1.5}", "expected an integer"),
        ("fold-constants{max_elements=0}", "at least 1"),
        ("exact{depth=3}", "preset 'exact' takes no options"),
    ],
)
def test_bad_options(text, message):
    with pytest.raises(OptionError, match=message):
        Pipeline.parse(text)


@pytest.mark.parametrize("source", [None, 3, {"dead-code": {}}, [None], ["dead-code", 3]])
def test_bad_sources(source):
    with pytest.raises(PipelineError):
        Pipeline.parse(source)


def test_sources_agree():
    cls = PASSES["fold-constants"]
    text = "fold-constants{max_elements=65536},dead-code"
    mixed = Pipeline.parse([cls(max_elements=1 << 16), "dead-code"])
    assert Pipeline.parse(text) == mixed == Pipeline.parse(mixed)
    assert Pipeline.parse("fold-constants{max_elements=64KiB},dead-code") == mixed
    assert Pipeline.parse("") == Pipeline([])


@pytest.mark.parametrize("name", sorted(registry.presets()))
def test_presets_expand(name):
    preset = Pipeline.parse(name)
    assert preset == Pipeline.parse(registry.presets()[name])
    assert preset.text() == registry.presets()[name]


# Order.


def test_stages_never_decrease():
    with pytest.raises(PipelineError, match=r"dead-code \(stage NORMALIZE\) stands after fuse-add-rmsnorm"):
        Pipeline.parse("fuse-add-rmsnorm,dead-code")


def test_declared_order():
    first, second = sine_pass("first-sine"), sine_pass("second-sine", after=("first-sine",))
    assert Pipeline([first(), second()]).text() == "first-sine,second-sine"
    assert Pipeline([second()]).text() == "second-sine"
    with pytest.raises(PipelineError, match="second-sine must come after first-sine"):
        Pipeline([second(), first()])


# Slots.


def test_two_owners_of_one_slot():
    first = sine_pass("first-owner", owns=("attention.layout",))
    second = sine_pass("second-owner", owns=("attention.layout", "attention.precision"), new=cosine)
    other = sine_pass("other-slot", owns=("attention.precision",))
    with pytest.raises(
        PipelineError, match=r"second-owner and first-owner both want attention\.layout of sin"
    ):
        Pipeline([first(), second()]).run(sines(2), RunOptions(replay=False))
    reports = Pipeline([first(), other()]).run(sines(2))
    assert [len(r.applied) for r in reports] == [2, 2]


def test_a_slot_conflict_rolls_back_its_own_pass_only():
    first = sine_pass("first-owner", owns=("attention.layout",))
    second = sine_pass("second-owner", owns=("attention.layout",))
    program, alone = sines(3), sines(3)
    first_alone = run_pass(first(), alone, RunOptions(), Fuel())
    reports = Pipeline([first(), second()]).run(program, RunOptions(on_pass_error="skip"))
    assert len(reports[0].applied) == len(first_alone.applied) == 3
    assert reports[1].applied == []
    assert "both want attention.layout" in reports[1].skipped
    assert print_graph(program.graph) == print_graph(alone.graph)


# Fuel.


@pytest.mark.parametrize("limit", [0, 1, 3, 4, 5, 8, 9, None])
def test_fuel_counts_applications_over_the_pipeline(limit):
    to_cosine = sine_pass("to-cosine", new=cosine, exactness=Exactness.ROUNDING)
    program = sines(4)
    again = sine_pass("sine-again")
    fuel = Fuel(limit)
    reports = Pipeline([to_cosine(), again()]).run(program, RunOptions(), fuel)
    applied = sum(len(r.applied) for r in reports)
    assert applied == fuel.spent == (4 if limit is None else min(limit, 4))
    assert count(program, aten.cos.default) == len(reports[0].applied)
    if limit is not None and limit < 4:
        assert reports[0].skipped == f"out of fuel after {limit} rewrites"
    else:
        assert not reports[0].skipped


@pytest.mark.parametrize("value", [-1, 1.5, "3", True])
def test_bad_fuel(value):
    with pytest.raises(OptionError, match="fuel"):
        RunOptions(fuel=value)


@pytest.mark.parametrize("field", ["verify", "on_pass_error"])
def test_bad_run_options(field):
    with pytest.raises(OptionError, match=f"{field} = 'maybe'"):
        RunOptions(**{field: "maybe"})


# Rollback.


class Unexpected(Exception):
    """What no pass should raise."""


def spoiler(name, error):
    """A pass that edits graph, buffers and derived tensors, then raises."""

    @graph_pass(name, stage=Stage.WEIGHTS, exactness=Exactness.BITWISE)
    class Spoiler(GraphPass):
        """rewrite: x -> error"""

        def apply(self, program, log):
            nodes = list(program.graph.nodes)
            weight = next(n for n in nodes if program.is_weight(n))
            call = next(n for n in nodes if n.op == "call_function")
            assert log.take(call)
            new = program.derive("doubled", (weight,), lambda w: w * 2)
            call.replace_input_with(call.all_input_nodes[0], new)
            program.module.register_buffer("stray", torch.zeros(2), persistent=False)
            program.graph.eliminate_dead_code()
            log.applied(call)
            raise error

        @classmethod
        def examples(cls):
            yield {}, Example(torch.sin, (Tensor(3),))

    return Spoiler()


def weighted():
    def model(x, w):
        return torch.sin(x * w) + torch.arange(3.0) * torch.cos(w)

    program = capture_example(Example(model, (Tensor(2, 3), Tensor(3, weight=True))))
    weight = next(n for n in program.graph.nodes if program.is_weight(n))
    program.derive("halved", (weight,), lambda w: w / 2)
    return program


def state(program):
    buffers = {k: (v, v.clone()) for k, v in program.module._buffers.items()}
    names = [n.name for n in program.graph.nodes]
    metas = [{k: v for k, v in n.meta.items() if k != "val"} for n in program.graph.nodes]
    return print_graph(program.graph), names, metas, buffers, list(program.derived)


def assert_same_state(one, two):
    assert one[:3] == two[:3]
    assert one[4] == two[4]
    assert one[3].keys() == two[3].keys()
    for key, (value, copy) in one[3].items():
        assert two[3][key][0] is value
        assert torch.equal(two[3][key][1], copy)


@pytest.mark.parametrize("error", [VerifyError("planted"), Unexpected("planted")])
def test_a_pass_that_raises_leaves_nothing_behind(error):
    program = weighted()
    before = state(program)
    with pytest.raises(type(error), match="planted") as caught:
        Pipeline([spoiler("spoiler", error)]).run(program)
    assert any("while running pass spoiler" in note for note in caught.value.__notes__)
    assert_same_state(before, state(program))
    program.graph.lint()
    program.module(*program.example_inputs)


def test_a_skipped_pass_is_recorded_and_the_rest_runs():
    program = weighted()
    before = state(program)
    fuel = Fuel()
    options = RunOptions(on_pass_error="skip")
    reports = Pipeline([spoiler("spoiler", VerifyError("planted"))]).run(program, options, fuel)
    assert reports[0].applied == []
    assert "rolled back" in reports[0].skipped
    assert "planted" in reports[0].skipped
    assert_same_state(before, state(program))
    later = Pipeline([sine_pass("later-sine")()]).run(program, options, fuel)
    assert len(later[0].applied) == 1


def test_an_unexpected_error_is_never_skipped():
    with pytest.raises(Unexpected):
        Pipeline([spoiler("spoiler", Unexpected("planted"))]).run(
            weighted(), RunOptions(on_pass_error="skip")
        )


# The verifier.


def call(program, place=0):
    return [n for n in program.graph.nodes if n.op == "call_function"][place]


def break_flat_kind(program):
    program.module.add_module("child", torch.nn.Identity())
    with program.graph.inserting_before(call(program)):
        program.graph.call_module("child", (call(program).args[0],))


def break_known_target(program):
    call(program).target = torch.nn.functional.silu


def break_value(program):
    del call(program).meta["val"]


def break_schema(program):
    call(program).kwargs = {"slope": 1.0}


def break_buffer(program):
    with program.graph.inserting_before(call(program)):
        node = program.graph.get_attr("forward")  # a name of the class, not a buffer
    node.meta["val"] = torch.zeros(2)


def break_weight(program):
    weight = next(n for n in program.graph.nodes if program.is_weight(n))
    with program.graph.inserting_before(call(program)):
        node = program.graph.call_function(aten.zero_.default, (weight,))
    node.meta["val"] = weight.meta["val"]


PLANTED = {
    "has_flat_kind": break_flat_kind,
    "has_known_target": break_known_target,
    "has_value": break_value,
    "fits_schema": break_schema,
    "reads_existing_buffer": break_buffer,
    "writes_only_state": break_weight,
}


def test_every_rule_has_a_planted_graph():
    assert [rule.__name__ for rule in verifier.RULES] == list(PLANTED)


@pytest.mark.parametrize("rule", PLANTED)
@pytest.mark.filterwarnings("ignore")
def test_a_broken_rule_is_named(rule):
    program = weighted()
    verifier.verify(program, blame="nobody")
    PLANTED[rule](program)
    with pytest.raises(VerifyError, match=f"some-pass broke rule {rule}: "):
        verifier.verify(program, blame="some-pass")


def test_changed_inputs_and_ill_formed_graphs_are_named():
    program = weighted()
    next(n for n in program.graph.nodes if n.op == "placeholder").name = "renamed"
    with pytest.raises(VerifyError, match="some-pass changed the inputs"):
        verifier.verify(program, blame="some-pass")
    program = weighted()
    program.graph.output(call(program))
    first, last = call(program), call(program, -1)
    last.append(first)
    with pytest.raises(VerifyError, match="some-pass left an ill-formed graph"):
        verifier.verify(program, blame="some-pass")


def test_wrong_shapes_are_named():
    program = weighted()
    verifier.verify_shapes(program, blame="nobody")
    call(program).meta["val"] = call(program).meta["val"].new_empty(5, 7)
    with pytest.raises(VerifyError, match=r"some-pass: \w+ computes torch.float32"):
        verifier.verify_shapes(program, blame="some-pass")


# Replay and comparison of outputs.


def test_replay_names_a_wrong_replacement():
    wrong = sine_pass("wrong-sine", new=lambda x: torch.sin(x * 1.001), exactness=Exactness.ROUNDING)
    program = sines(2)
    before = print_graph(program.graph)
    with pytest.raises(
        VerifyError, match=r"wrong-sine \(form '\w*'\) is wrong at sin: the replacement differs"
    ):
        Pipeline([wrong()]).run(program)
    assert print_graph(program.graph) == before


def test_replay_holds_bitwise_passes_to_the_bit():
    nearly = sine_pass("nearly-sine", new=cosine)
    with pytest.raises(VerifyError, match="at most 0 is allowed"):
        Pipeline([nearly()]).run(sines(1))
    rounding = sine_pass("rounding-sine", new=cosine, exactness=Exactness.ROUNDING)
    report = Pipeline([rounding()]).run(sines(1))[0]
    assert 0 < report.applied[0].replay_error < 1e-5


def test_outputs_are_compared_in_float64_without_replay():
    wrong = sine_pass("wrong-sine", new=lambda x: torch.sin(x) * 1.0001)
    options = RunOptions(verify="outputs", replay=False)
    with pytest.raises(VerifyError, match=r"wrong-sine changed output 0 by 0\.0001"):
        Pipeline([wrong()]).run(sines(1), options)
    right = sine_pass("right-sine")
    program = weighted()
    reports = Pipeline.parse(["fold-constants", right()]).run(program, options)
    assert len(reports[1].applied) == 1


# Programs.


def test_clones_are_independent():
    program = weighted()
    before = state(program)
    clone = program.clone()
    assert print_graph(clone.graph) == before[0]
    Pipeline([sine_pass("right-sine")()]).run(clone)
    weight = next(n for n in clone.graph.nodes if clone.is_weight(n))
    clone.derive("other", (weight,), torch.neg)
    clone.inputs[0].mutated = True
    clone.example_inputs[0] = None
    assert_same_state(before, state(program))
    assert not program.inputs[0].mutated
    assert program.example_inputs[0] is not None
    assert print_graph(clone.graph) != before[0]
