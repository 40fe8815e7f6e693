"""The self-test rejects passes that are wrong in one way each, and accepts their right twins."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from tilewright.compiler import ACCEPT, Exactness, Example, Rewrite, Stage, Tensor, rewrite_pass
from tilewright.compiler.selftest import SelfTestError, selftest

X = Tensor(3, 7)
ROUNDING, BITWISE = Exactness.ROUNDING, Exactness.BITWISE


def declared(
    name, replacement, *, where=None, examples=None, exactness=ROUNDING, trains=False, pattern=None, **more
):
    """A pass over 2 * x, defined on the spot."""

    def default_examples(cls):
        yield {}, Example(lambda x: torch.tanh(x * 2.0), (X,))

    body = {
        "__doc__": "Twice.\n\nrewrite:\n    x * 2 -> x + x\n",
        "__module__": __name__,
        "pattern": staticmethod(pattern or (lambda x: x * 2.0)),
        "where": lambda self, m: ACCEPT,
        "replacement": replacement,
        "examples": classmethod(examples or default_examples),
        **more,
    }
    cls = type(f"Pass{name.title().replace('-', '')}", (Rewrite,), body)
    return rewrite_pass(name, stage=Stage.NORMALIZE, exactness=exactness, trains=trains)(cls)


def doubled(self, x):
    return x + x


def test_a_right_pass_is_accepted():
    result = selftest(declared("right-twice", doubled, trains=True))
    assert (result.accepted, result.proved, result.worst_error) == (1, 1, 0.0)


@pytest.mark.parametrize(
    ("name", "replacement", "exactness", "said"),
    [
        ("wrong-factor", lambda self, x: x + x * 1.001, ROUNDING, "is wrong at"),
        ("wrong-shape", lambda self, x: (x + x)[:1], ROUNDING, "is wrong at"),
        ("wrong-bits", lambda self, x: (x / 3.0) * 6.0, BITWISE, "off by"),
        ("wrong-repeat", lambda self, x: (x * 1.0) * 2.0, ROUNDING, "a second run applied 1 more"),
    ],
)
def test_a_wrong_replacement_is_rejected(name, replacement, exactness, said):
    with pytest.raises(Exception, match=said):
        selftest(declared(name, replacement, exactness=exactness))


def test_wrong_gradients_are_rejected():
    with pytest.raises(SelfTestError, match="gradient"):
        selftest(declared("wrong-gradient", lambda self, x: x.detach() + x, trains=True))


def test_the_number_of_applications_counts():
    def examples(cls):
        yield {}, Example(lambda x: (x * 2.0) * 2.0, (X,), count=1)

    with pytest.raises(SelfTestError, match="applied 2 times, expected 1"):
        selftest(declared("wrong-count", doubled, examples=examples))


def test_an_example_that_proves_nothing_is_rejected():
    def examples(cls):
        yield {}, Example(lambda x: x * 2.0, (torch.zeros(3, 7),))

    with pytest.raises(SelfTestError, match="could be zeros"):
        selftest(declared("wrong-example", doubled, examples=examples))


PICKY = '''
import torch
from tilewright.compiler import ACCEPT, Exactness, Example, Rewrite, Stage, Tensor, refuse, rewrite_pass

@rewrite_pass("{name}", stage=Stage.NORMALIZE, exactness=Exactness.ROUNDING)
class Picky(Rewrite):
    """Twice, of tables.

    rewrite:
        x * 2 -> x + x
    """

    @staticmethod
    def pattern(x):
        return x * 2.0

    def where(self, m):
        if m.val("x").dim() == 1:
            return refuse("x has one axis")
        return ACCEPT

    def replacement(self, x):
        return x + x

    @classmethod
    def examples(cls):
        yield {{}}, Example(lambda x: torch.tanh(x * 2.0), (Tensor(3, 7),))
        {more}
'''


def refused(reason):
    return f"yield {{}}, Example(lambda x: torch.tanh(x * 2.0), (Tensor(7),), refusal={reason!r})"


def picky(folder, name, more=""):
    """The pass above in a file of its own, as the coverage of refusals is per file."""
    path = folder / f"{name.replace('-', '_')}.py"
    path.write_text(PICKY.format(name=name, more=more))
    spec = importlib.util.spec_from_file_location(f"written_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Picky


def test_every_refusal_needs_an_example(tmp_path):
    with pytest.raises(SelfTestError, match="no example reaches the refusal in line 19"):
        selftest(picky(tmp_path, "wrong-coverage"))
    result = selftest(picky(tmp_path, "right-coverage", refused("one axis")))
    assert (result.accepted, result.refused) == (1, 1)


def test_a_refusal_needs_its_reason(tmp_path):
    with pytest.raises(SelfTestError, match="did not refuse with 'two axes'"):
        selftest(picky(tmp_path, "wrong-reason", refused("two axes")))


def test_every_form_needs_an_example():
    def forms(x):
        yield "twice", x * 2.0
        yield "thrice", torch.relu(x) * 3.0

    with pytest.raises(SelfTestError, match="no example has the form 'thrice'"):
        selftest(declared("wrong-forms", doubled, pattern=forms))


def approximate(name, replacement, reference, limit):
    return declared(
        name,
        replacement,
        exactness=Exactness.APPROXIMATE,
        reference=reference,
        exact_limit=limit,
    )


def test_an_approximate_pass_equals_its_reference_and_its_limit():
    def rounded(self, x):
        return torch.round(x + x)

    def exact(self):
        return declared("exact-twice", doubled)()

    assert selftest(approximate("round-twice", rounded, rounded, exact)).accepted == 1
    with pytest.raises(SelfTestError, match="against its reference"):
        selftest(approximate("wrong-reference", rounded, lambda self, x: torch.floor(x + x), exact))
    with pytest.raises(SelfTestError, match="at its exact limit"):
        selftest(approximate("wrong-limit", rounded, rounded, lambda self: self))
