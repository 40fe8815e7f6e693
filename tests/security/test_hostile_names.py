"""Names that a model brings never reach generated source, and cannot add a line to a graph or an error."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import pytest
import torch
from torch import nn

from tilewright.compiler import registry
from tilewright.compiler.diagnostics import (
    LoweringError,
    OptionError,
    PipelineError,
    TilewrightError,
    printable,
    shown,
)
from tilewright.compiler.options import split_pipeline
from tilewright.compiler.pipeline import Pipeline
from tilewright.frontends.api import explain
from tilewright.frontends.report_html import embedded, page_data
from tilewright.frontends.report_terminal import plain_lines
from tilewright.kernels.common.family import ARCHS
from tilewright.kernels.table import FAMILIES, host_target, select
from tilewright.runtime.build import CompileFailed, compile_flags
from tilewright.runtime.contracts import KernelKey, Refusal, Target

SEEDS = (
    '"); system("true"); //',
    "'; __import__('os')._exit(3); '",
    "*/ int owned = 1; /*",
    '"""\nimport os\n"""',
    "'''\nimport os\n'''",
    "\n#include </etc/passwd>\n",
    "x\\\n#define float double",
    "??/\n??=include <evil>",
    "__asm__(\"ud2\")",
    "{op}{schema}{0}{{}}",
    "%s%n%d",
    "${HOME}`id`$(id)",
    "int",
    "template<class T> struct",
    "lambda: 0",
    "\u202egnp.exe",
    "\u2028return 1",
    "\x00\x1b[2J",
    "\ufeffx",
    "ｓｙｓｔｅｍ",
    "a" * 3000,
    "-fplugin=evil.so",
    "../../../etc/passwd",
    "# noqa\nraise SystemExit",
    "<|endoftext|>",
)  # fmt: skip
WRAPS = (
    "{}", "{} b", "'{}'", '"{}"', "a{}", "{}\\", "({}", "{}=1", "\t{}", "{}\r\n", "x{}x", "{}//", "/*{}",
    "{}*/", "R\"({})\"", "u8{}", "{}\u200b", "[{}]", "{}@0", "L['{}']",
)  # fmt: skip
CORPUS = [wrap.replace("{}", seed) for seed, wrap in itertools.product(SEEDS, WRAPS)]
NAMES = [name.replace(".", "_") for name in CORPUS]
"""A dot separates modules, so torch refuses it in a name."""
AT_ONCE = 125
PLAIN = [f"child_{i}" for i in range(AT_ONCE)]


def test_the_corpus_is_large():
    assert len(set(NAMES)) == len(CORPUS) == 500


# Names of modules and parameters, through capture, passes, generated kernels and every view


class Chain(nn.Module):
    """Normalised, gated and projected sums; every module and parameter has a given name."""

    def __init__(self, names):
        super().__init__()
        torch.manual_seed(0)
        self.names = names
        for i, name in enumerate(names):
            if i % 3 == 0:
                self.add_module(name, nn.RMSNorm(24))
            elif i % 3 == 1:
                self.add_module(name, nn.Linear(24, 24))
            else:
                self.register_parameter(name, nn.Parameter(torch.randn(24)))

    def forward(self, x):
        for i, name in enumerate(self.names):
            x = x * self._parameters[name] if i % 3 == 2 else x + self._modules[name](x)
        return x


def compiled(names):
    """(report, kernels by node in order, generated texts)"""
    torch._dynamo.reset()
    report = explain(Chain(names), (torch.randn(2, 24),), "exact", lower="eager")
    files = sorted({row["source"] for row in report.kernels if row["source"]})
    texts = []
    for file in files:
        with open(file, encoding="utf-8") as opened:
            texts.append(opened.read())
    return report, [(row["op"], row["kernel"]) for row in report.kernels], texts


def without_paths(graph):
    return [line.partition("  # ")[0] for line in graph.split("\n")]


@pytest.fixture(scope="module")
def benign():
    return compiled(PLAIN)


@pytest.mark.skipif(host_target().arch == "generic", reason="kernels need AVX2")
@pytest.mark.parametrize("block", range(len(NAMES) // AT_ONCE))
def test_names_of_modules_reach_no_generated_text(block, benign):
    report, kernels, texts = compiled(NAMES[AT_ONCE * block : AT_ONCE * (block + 1)])
    plain_report, plain_kernels, plain_texts = benign
    assert len(plain_texts) >= 2
    assert len(plain_report.passes[1].graph_after.split("\n")) > AT_ONCE
    assert kernels == plain_kernels
    assert texts == plain_texts
    for mine, theirs in zip(report.passes, plain_report.passes, strict=True):
        assert without_paths(mine.graph_after) == without_paths(theirs.graph_after)
        assert all(line.isprintable() for line in mine.graph_after.split("\n"))
        for done, plain in zip(mine.applied, theirs.applied, strict=True):
            assert (done.rule, len(done.inserted)) == (plain.rule, len(plain.inserted))
    lines = plain_lines(report)
    assert len(lines) == len(plain_lines(plain_report))
    assert all(line.isprintable() for line in lines)
    text = embedded(page_data(report))
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(report.to_json()) == json.loads(json.dumps(report.to_dict()))


# Words of a kernel key


def keys():
    for family in FAMILIES.values():
        for args in family.examples():
            for target in (Target(kind, archs[0]) for kind, archs in ARCHS.items()):
                key = family.configure(args, target)
                if not isinstance(key, Refusal):
                    yield family, key


@pytest.mark.parametrize(("family", "key"), keys(), ids=lambda v: getattr(v, "op", ""))
def test_a_generator_refuses_words_that_are_not_ours(family, key):
    """Also where a kernel key was made by hand: nothing but plain words and numbers reaches a template."""
    assert family.source(key)
    for bad in CORPUS:
        if re.fullmatch("[a-z][a-z0-9_]*", bad):
            continue  # a plain word is harmless
        hostile = [
            dataclasses.replace(key, dtype=bad),
            dataclasses.replace(key, target=Target(key.target.kind, bad)),
            dataclasses.replace(key, target=Target(bad, key.target.arch)),
            dataclasses.replace(key, config=(*key.config, (bad, 1))),
        ]
        for i, (name, value) in enumerate(key.config):
            if isinstance(value, str):
                changed = (*key.config[:i], (name, bad), *key.config[i + 1 :])
                hostile.append(dataclasses.replace(key, config=changed))
        for changed in hostile:
            with pytest.raises(LoweringError, match=r"no kernel|expected a word or number"):
                family.source(changed)


@pytest.mark.parametrize("bad", CORPUS[:40])
def test_targets_and_activations_come_from_tables(bad):
    x = torch.empty(2, 24, device="meta")
    assert isinstance(select("rms_norm", Target("cpu", bad), (x, None, 1e-6)), Refusal)
    assert isinstance(select("gated_mlp", Target("cpu", "avx2"), (x, x, bad)), Refusal)
    with pytest.raises(CompileFailed, match="is not one of"):
        compile_flags(bad)
    with pytest.raises(LoweringError):
        select(bad, Target("cpu", "avx2"), (x,))


def test_a_kernel_key_has_no_other_words():
    """A new field of the key must be checked in `KernelFamily.source` and be tried above."""
    assert {f.name for f in dataclasses.fields(KernelKey)} == {"op", "target", "dtype", "config"}


# Text of pipelines and errors


@pytest.mark.parametrize("bad", CORPUS[::7])
def test_errors_stay_one_short_printable_line(bad):
    for attempt in (
        lambda: Pipeline.parse(bad),
        lambda: Pipeline.parse(f"gqa-unrepeat{{{bad}=1}}"),
        lambda: Pipeline.parse(f"gqa-unrepeat{{form={bad}}}"),
        lambda: registry.find(bad),
    ):
        with pytest.raises(TilewrightError) as caught:
            attempt()
        line = caught.value.line()
        assert line.isprintable()
        assert len(line) < 600, "a long name is cut"


def test_long_names_and_values_are_cut():
    for text in (f"gqa-unrepeat{{{'x' * 5000}=1}}", f"gqa-unrepeat{{form={'y' * 5000}}}", "z" * 5000):
        with pytest.raises((OptionError, PipelineError)) as caught:
            Pipeline.parse(text)
        assert len(caught.value.line()) < 400
        assert " ... " in caught.value.line()
    assert shown("a" * 60) == repr("a" * 60)
    with pytest.raises(PipelineError, match="given twice"):
        split_pipeline(f"a{{{'k' * 900}=1,{'k' * 900}=2}}")


def test_printable_text_is_kept_as_it_is():
    assert printable("Größe 3 µs – ok") == "Größe 3 µs – ok"
    assert printable("a\nb\x1b[2J\u202e\ud800") == r"a\nb\x1b[2J\u202e\ud800"
