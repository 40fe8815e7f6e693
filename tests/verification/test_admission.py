"""Passes of others prove what they claim before they rewrite anything; ours within a second a rule."""

from __future__ import annotations

import importlib.metadata
import sys
import textwrap
import time

import pytest
import torch

from tilewright.compiler import registry
from tilewright.compiler.admission import DRAWS, prove
from tilewright.compiler.diagnostics import ProofError
from tilewright.compiler.pipeline import Pipeline
from tilewright.compiler.rewrite import Rewrite
from tilewright.compiler.selftest import SelfTestError, selftest
from tilewright.compiler.stage import Exactness
from tilewright.frontends.api import optimize

SOURCE = '''
"""A pass from somebody else."""

import torch
from tilewright.compiler import Exactness, Example, Rewrite, Stage, Tensor, rewrite_pass


@rewrite_pass("{name}", stage=Stage.WEIGHTS, exactness=Exactness.{exactness})
class Foreign(Rewrite):
    """Turns a product around.

    rewrite:
        {left} -> {right}
    """

    @staticmethod
    def pattern({names}):
        return {left}

    def replacement(self, {names}):
        return {right}

    @classmethod
    def examples(cls):
        yield {{}}, Example(lambda {names}: torch.tanh({model}), ({inputs}))
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Offers a pass the way an installed package does: a module on the path and an entry point."""
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    monkeypatch.syspath_prepend(tmp_path)
    points = []

    def add(name, left, right, *, names="a, b", shapes=((3, 4), (4, 3)), exactness="ROUNDING", model=None):
        module = f"foreign_{name.replace('-', '_')}"
        text = SOURCE.format(
            name=name, left=left, right=right, names=names, exactness=exactness, model=model or left,
            inputs=", ".join(f"Tensor{shape}" for shape in shapes) + ",",
        )  # fmt: skip
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(text))
        points.append(importlib.metadata.EntryPoint(name, f"{module}:Foreign", registry.ENTRY_POINT_GROUP))
        monkeypatch.setattr(registry, "_FILES", None)

    known = importlib.metadata.entry_points

    def entry_points(**given):
        return points if given == {"group": registry.ENTRY_POINT_GROUP} else known(**given)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    yield add
    for name in [n for n in sys.modules if n.startswith("foreign_")]:
        del sys.modules[name]


A, B = torch.randn(3, 4), torch.randn(4, 3)


def model(a, b):
    return torch.tanh(a @ b) + 1


def test_a_right_pass_of_somebody_else_is_used(install):
    install("turn-product", "a @ b", "(b.T @ a.T).T")
    compiled = optimize(model, (A, B), "turn-product", lower="eager")
    assert compiled.report.applied("turn-product") == 1
    torch.testing.assert_close(compiled(A, B), model(A, B))


WRONG = {
    "lost-transpose": ("a @ b", "b.T @ a.T", "result 0 at"),
    "wrong-factor": ("a @ b", "(a @ b) * 1.0000001", "result 0 at"),
    "wrong-size": ("a @ b", "(a @ b)[:1]", "shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_one_is_refused_with_a_counterexample(name, install, monkeypatch):
    left, right, said = WRONG[name]
    install(name, left, right)
    ran = []
    monkeypatch.setattr(Pipeline, "run", lambda *args: ran.append(args))
    with pytest.raises(ProofError) as caught:
        optimize(model, (A, B), name, lower="eager")
    line = caught.value.line()
    assert f"{name}: example 0" in line
    assert "claims to be rounding and is not" in line or "shape" in line
    assert said in line
    assert "declare it APPROXIMATE" in line
    assert not ran, "the user's graph was rewritten"


def test_the_verdict_is_reached_once(install, monkeypatch):
    install("lost-transpose", "a @ b", "b.T @ a.T")
    for _ in range(2):
        with pytest.raises(ProofError):
            Pipeline.parse("lost-transpose")
        monkeypatch.setattr("tilewright.compiler.admission.prove", lambda cls: pytest.fail("proved again"))


def test_a_pass_that_applies_nowhere_proves_nothing(install):
    install("turn-product", "a @ b", "(b.T @ a.T).T", model="a + b.T")
    with pytest.raises(ProofError, match="no example of it applies"):
        Pipeline.parse("turn-product")


def test_values_made_by_hand_are_held_to_it_too(install):
    install("lost-transpose", "a @ b", "b.T @ a.T")
    cls = registry.find("lost-transpose")
    with pytest.raises(ProofError, match="rule lost-transpose"):
        cls()
    with pytest.raises((SelfTestError, Exception), match="wrong|identity"):
        selftest(cls)


def test_a_rule_that_holds_for_some_inputs_is_refused(install):
    install("drop-sign", "torch.abs(a)", "torch.relu(a)", names="a", shapes=((5, 7),))
    with pytest.raises(
        ProofError, match=r"for inputs f32\[5, 7\] drawn at seed 0, result 0 at .* instead of"
    ):
        Pipeline.parse("drop-sign")


RULES = [
    name
    for name, cls in registry.load_all().items()
    if issubclass(cls, Rewrite) and cls.exactness is not Exactness.APPROXIMATE
]


@pytest.mark.parametrize("name", RULES)
def test_our_rules_are_proved_within_a_second_each(name):
    """A rule is one form of a pattern."""
    cls = registry.find(name)
    started = time.process_time()
    proved = prove(cls)
    taken = time.process_time() - started
    assert proved > 0
    assert taken <= 1.0 * len(cls.compiled_pattern().forms) + 1.0
    assert DRAWS >= 5


def test_a_foreign_pass_is_one_that_lives_elsewhere(install):
    install("turn-product", "a @ b", "(b.T @ a.T).T")
    assert registry.is_foreign(registry.find("turn-product"))
    assert not registry.is_foreign(registry.find("match-linear"))
    assert "turn-product" in registry.names()
