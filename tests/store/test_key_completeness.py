"""What decides an artifact is in its key: options, pass options, kernel keys, sources, versions, environment.

The cases are generated over dataclass fields, parameters and template texts, so that a new one without a row
or without an effect fails here. Stored artifacts of ours are kernels, whose key is their whole source text,
and GGUF files turned into safetensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import types
import typing

import pytest
import torch
from torch import nn

from tilewright.compiler import registry
from tilewright.compiler.block_layout import BlockLayout, Predicate
from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.float_format import FloatFormat
from tilewright.compiler.ops.mlp import ACTIVATIONS
from tilewright.compiler.ops.packed import packed_width
from tilewright.compiler.options import parse_value, split_pipeline
from tilewright.compiler.weight_format import WeightFormat
from tilewright.frontends import hugging_face
from tilewright.frontends.api import explain
from tilewright.frontends.compile import CompileOptions
from tilewright.kernels import load
from tilewright.kernels.common import abi, cpp, triton_text
from tilewright.kernels.common.family import ARCHS
from tilewright.kernels.quantized_linear.family import ACTIVATION_WORD, PACKING
from tilewright.kernels.table import FAMILIES, host_target
from tilewright.runtime import build as builder
from tilewright.runtime import settings
from tilewright.runtime.contracts import KernelKey, Refusal, Target
from tilewright.runtime.store import ArtifactStore, key_digest

TARGETS = [Target(kind, arch) for kind, archs in ARCHS.items() for arch in archs]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_kernels = pytest.mark.skipif(host_target().arch == "generic", reason="kernels need AVX2")


@pytest.fixture
def keys(monkeypatch, tmp_path):
    """The keys that the store is asked for; nothing is built."""
    asked = []

    def get_or_build(self, key, build):
        asked.append(dict(key))
        return tmp_path

    monkeypatch.setattr(ArtifactStore, "get_or_build", get_or_build)
    return asked


# Kernel keys


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def norm_arguments(op):
    for dtype, weight, offset, rounding in itertools.product(
        DTYPES, (None, *DTYPES), (0.0, 1.0), ("scale_first", "scale_last")
    ):
        x = meta(4, 24, dtype=dtype)
        given = (x, x) if op == "add_rms_norm" else (x,)
        yield (*given, None if weight is None else meta(24, dtype=weight), 1e-6, offset, rounding)


def linear_arguments(counts):
    for dtype, rows, count, biased in itertools.product(DTYPES, (1, 2, 3, 8), counts, (False, True)):
        weights = [meta(5 + i, 24, dtype=dtype) for i in range(count)]
        biases = [meta(5 + i, dtype=dtype) if biased else None for i in range(count)]
        x = meta(rows, 24, dtype=dtype)
        yield (x, weights[0], biases[0]) if counts == (1,) else (x, weights, biases)


def block_sparse_arguments():
    layout = BlockLayout.causal(8, 8, 2)
    rules = (Predicate.pad_self(), Predicate.user())
    index, lengths = torch.arange(8, dtype=torch.int32)[None], torch.ones(1, dtype=torch.int32)
    more = dict.fromkeys(("k_valid", "q_valid", "limit"), lengths) | {"src_q": index, "src_k": index}
    more["mask"] = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    layout = BlockLayout.from_tensors({**layout.as_tensors(), **more}, rules)
    q = meta(1, 2, 8, 32)
    yield (q, q, q, *[a.to("meta") if isinstance(a, torch.Tensor) else a for a in layout.arguments()], None)


def block_sparse_backward_arguments():
    for q, k, v, *layout in block_sparse_arguments():
        yield (q, None, q, k, v, q, meta(*q.shape[:3]), *layout)


def block_sparse_code_arguments():
    plain = [
        a.to("meta") if isinstance(a, torch.Tensor) else a for a in BlockLayout.dense(8, 8, 2).arguments()
    ]
    whole = next(iter(block_sparse_arguments()))[3:]
    for dtype, (size, value) in itertools.product(DTYPES[1:], ((32, 32), (24, 32))):
        q, v = (meta(1, 2, 8, n, dtype=dtype) for n in (size, value))
        yield (q, q, v, *whole)
        yield (q, q, v, *plain, None)


def paged_arguments(op):
    """Every combination of what a kernel of a pool is specialised by."""
    index, place = meta(2, 20, dtype=torch.int32), meta(2, dtype=torch.int64)
    listed = meta(2, 3, 8, dtype=torch.int32)
    for dtype, (size, value, page), flag in itertools.product(
        DTYPES, ((64, 64, 16), (32, 48, 8)), (False, True)
    ):
        q, one = meta(2, 9, 1, size, dtype=dtype), meta(2, 3, 1, size, dtype=dtype)
        k, v = meta(40, 3, page, size, dtype=dtype), meta(40, 3, page, value, dtype=dtype)
        plane, given = meta(40, 3, size, dtype=dtype), place if flag else None
        yield from {
            "paged_attention": [(q, k, v, index, place, given, p, None) for p in (None, listed)],
            "token_attention": [(q, k, v, index, place, listed, given, None)],
            "paged_append": [
                (
                    k,
                    v,
                    index,
                    place,
                    one,
                    meta(2, 3, 1, value, dtype=dtype),
                    *([plane] * 2 if flag else [None] * 2),
                )
            ],
            "page_bounds": [(q, plane, plane, index, place, page, given, g) for g in ("max", "sum")],
            "attention_mass": [(q, one, meta(2, 9, 1), given, None, c) for c in (False, True)],
        }[op]


def packed_arguments(op):
    """Every combination of what a kernel of a pool of packed rows is specialised by."""
    index, place = meta(2, 20, dtype=torch.int32), meta(2, dtype=torch.int64)
    for dtype, (size, value, page), bits, group, first in itertools.product(
        DTYPES, ((64, 64, 16), (32, 64, 8)), (8, 4), (0, 32), (None, place)
    ):
        k, v = (meta(40, 3, page, packed_width(n, bits, group), dtype=torch.uint8) for n in (size, value))
        if op == "packed_attention":
            yield meta(2, 9, 1, size, dtype=dtype), k, v, index, place, bits, group, first, None
        elif first is None:
            rows = (meta(2, 3, 1, n, dtype=dtype) for n in (size, value))
            yield k, v, index, place, *rows, bits, group


def formats():
    choices = (
        (2, 4, 8),
        (0, 32, 64),
        ("symmetric", "float-zero"),
        ACTIVATION_WORD,
        set(PACKING.values()),
        ("short", "wide"),
    )
    for choice in itertools.product(*choices):
        with contextlib.suppress(OptionError):
            yield WeightFormat(*choice)
    yield FloatFormat("nvfp4", 16)
    for choice in itertools.product(("fp8-e4m3", "fp8-e5m2"), (0, 32), (False,), ("none", "fp8-token")):
        yield FloatFormat(*choice)


def quantized_arguments(counts):
    for form, dtype, count, biased in itertools.product(formats(), DTYPES, counts, (False, True)):
        rows = [32 + 8 * i for i in range(count)]
        packed = [meta(*form.shape(n, 64), dtype=torch.uint8) for n in rows]
        biases = [meta(n, dtype=dtype) if biased else None for n in rows]
        x = meta(3, 64, dtype=dtype)
        if counts == (1,):
            yield x, packed[0], biases[0], rows[0], form.text
        else:
            yield x, packed, biases, rows, form.text


ARGUMENTS = {
    "rms_norm": lambda: norm_arguments("rms_norm"),
    "add_rms_norm": lambda: norm_arguments("add_rms_norm"),
    "gated_mlp": lambda: ((*[meta(4, 24, dtype=d)] * 2, a) for d in DTYPES for a in ACTIVATIONS),
    "linear": lambda: linear_arguments((1,)),
    "linear_multi": lambda: linear_arguments((2, 3)),
    "quantized_linear": lambda: quantized_arguments((1,)),
    "quantized_linear_multi": lambda: quantized_arguments((2, 3)),
    "block_sparse_attention": lambda: block_sparse_arguments(),
    "block_sparse_attention_backward": lambda: block_sparse_backward_arguments(),
    "block_sparse_attention_int8": lambda: block_sparse_code_arguments(),
    "block_sparse_attention_fp8": lambda: block_sparse_code_arguments(),
    "paged_attention": lambda: paged_arguments("paged_attention"),
    "token_attention": lambda: paged_arguments("token_attention"),
    "paged_append": lambda: paged_arguments("paged_append"),
    "page_bounds": lambda: paged_arguments("page_bounds"),
    "attention_mass": lambda: paged_arguments("attention_mass"),
    "packed_attention": lambda: packed_arguments("packed_attention"),
    "packed_append": lambda: packed_arguments("packed_append"),
}
"""Arguments that, with a family's examples, give every option of its kernels each of its values. A family
without a row is tried on its examples alone."""

CONSTANT = {
    "residual": "the op says it",
    "count": "linear has one weight",
    "streams": "a constant of the generator",
}
"""Options of kernels that may have one value only within a family."""


def kernel_keys(op):
    """Every key of a family: key -> arguments that lead to it."""
    found = {}
    for args, target in itertools.product([*ARGUMENTS.get(op, tuple)(), *FAMILIES[op].examples()], TARGETS):
        key = FAMILIES[op].configure(args, target)
        if not isinstance(key, Refusal):
            found.setdefault(key, args)
    return found


class Context:
    """The `ctx` of an autograd formula."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


def filled(value, generator):
    """Real values in place of meta tensors."""
    if isinstance(value, torch.Tensor):
        return torch.randn(value.shape, generator=generator).to(value.dtype)
    return [filled(v, generator) for v in value] if isinstance(value, (list, tuple)) else value


def described(value):
    """A result as something that compares: tensors by dtype and bits."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return [(v.dtype, v.tolist()) if isinstance(v, torch.Tensor) else v for v in leaves]


def registration(family, key, args):
    """What an op is registered with beside its text: schema, shapes, gradients, launch arguments."""
    generator = torch.Generator().manual_seed(0)
    given = filled(list(family.rewrite_args(key, args)), generator)
    outputs = family.fake(key)(*given)
    if family.backward is None:  # inference only
        return [family.schema(key), described(torch.utils._pytree.tree_map(torch.zeros_like, outputs))]
    outputs = filled(outputs, generator)
    context = Context()
    family.save(key)(context, tuple(given), outputs)
    grads = outputs if isinstance(outputs, (list, tuple)) else (outputs,)
    row = [
        family.schema(key),
        described([torch.empty_like(o).zero_() for o in grads]),
        described(family.backward(key)(context, *grads)),
    ]
    if key.target.kind != "cpu":
        row.append(family.triton.constants(key, 24))  # the types of arguments are Triton's to specialise by
    return row


def collisions(family, found):
    """Pairs of keys that share a name, hence an op in the process, but would register different ones."""
    by_name, wrong = {}, []
    for key, args in found.items():
        name, _ = family.source(key)
        other = by_name.setdefault(name, key)
        if other is not key and registration(family, other, args) != registration(family, key, args):
            wrong.append((other, key))
    return wrong


@pytest.mark.parametrize("op", sorted(FAMILIES))
def test_equal_kernel_names_mean_equal_kernels(op):
    found = kernel_keys(op)
    targets = [target for target in TARGETS if target.kind in FAMILIES[op].generate]
    assert len(found) >= (len(targets) * len(DTYPES) if op in ARGUMENTS else 1)
    assert not collisions(FAMILIES[op], found)


def test_a_kernel_option_that_is_not_in_the_text_is_noticed():
    family = FAMILIES["gated_mlp"]
    careless = dataclasses.replace(
        family, generate=dict.fromkeys(ARCHS, lambda key, op: f"// {op} {key.target}")
    )
    assert collisions(careless, kernel_keys("gated_mlp"))


@pytest.mark.parametrize("op", sorted(ARGUMENTS))
def test_every_option_of_a_kernel_is_tried_with_two_values(op):
    seen = {}
    for key in kernel_keys(op):
        for name, value in key.config:
            seen.setdefault(name, set()).add(value)
    for name, values in seen.items():
        assert len(values) > 1 or name in CONSTANT, f"{op}: give ARGUMENTS with another value of {name}"


CHANGES = {
    "op": lambda key: dataclasses.replace(key, op="other"),
    "target": lambda key: dataclasses.replace(key, target=Target("cpu", "avx512")),
    "dtype": lambda key: dataclasses.replace(key, dtype="float16"),
    "config": lambda key: dataclasses.replace(key, config=(("activation", "relu"),)),
}


def test_every_field_of_a_kernel_key_reaches_the_store(keys, monkeypatch):
    """op is in the name of the family; the others change the text or the compiler's flags."""
    assert set(CHANGES) == {f.name for f in dataclasses.fields(KernelKey)}
    assert {f.name for f in dataclasses.fields(Target)} == {"kind", "arch"}
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    family = FAMILIES["gated_mlp"]
    key = family.configure((meta(4, 24), meta(4, 24), "silu"), Target("cpu", "avx2"))
    digests = []
    for changed in (key, *(CHANGES[name](key) for name in ("target", "dtype", "config"))):
        name, text = family.source(changed)
        load._load_cpp(name, text, changed)
        digests.append(key_digest(keys[-1]))
        assert keys[-1]["source"] == text
        assert keys[-1][f"header {abi.HEADER}"] == abi.TORCH_ABI
    assert len(set(digests)) == len(digests)
    other = dataclasses.replace(family, op="other")
    assert other.source(key)[0] != family.source(key)[0]


def test_a_stored_triton_file_is_keyed_by_its_text(keys):
    load.store_triton_source("a", "text of a")
    load.store_triton_source("a", "text of b")
    assert [k["source"] for k in keys] == ["text of a", "text of b"]


# Sources of the generators


def texts_of(keys):
    return {(op, key): FAMILIES[op].source(key) for op, key in keys}


def some_keys(texts):
    """Of all kernels a few that together hold every snippet, and every seventh."""
    chosen, held = list(texts)[::7], set()
    for place, (_, text) in texts.items():
        new = {s for s, by_isa in cpp._TEXTS.items() if any(t in text for t in by_isa.values())} - held
        if new:
            chosen.append(place)
            held |= new
    return list(dict.fromkeys(chosen))


@pytest.mark.parametrize("every", [pytest.param(True, marks=pytest.mark.slow), False])
def test_every_template_of_the_generators_is_in_some_name(monkeypatch, every):
    """A changed snippet or frame changes the name of each kernel whose text holds it, and of one at least."""
    before = texts_of((op, key) for op in FAMILIES for key in kernel_keys(op))
    if not every:
        before = texts_of(some_keys(before))
    for snippet in sorted(cpp._TEXTS):
        changed = {isa: f"{text}\n// changed" for isa, text in cpp._TEXTS[snippet].items()}
        with monkeypatch.context() as patch:
            patch.setitem(cpp._TEXTS, snippet, changed)
            after = texts_of(before)
        moved = [k for k in before if before[k][0] != after[k][0]]
        holds = [
            k
            for k in before
            if k[1].target.kind == "cpu" and any(t in before[k][1] for t in cpp._TEXTS[snippet].values())
        ]
        assert moved, snippet
        assert set(moved) == set(holds), snippet
    for module in (cpp, triton_text):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_FILE", module._FILE + "\n# changed\n")
            after = texts_of(before)
        kind = "cpu" if module is cpp else "gpu"
        for (op, key), (name, _) in before.items():
            ours = (key.target.kind == "cpu") == (kind == "cpu")
            assert (after[op, key][0] != name) == ours


# Inputs of the C++ build


def changed_flags(monkeypatch):
    monkeypatch.setattr(builder, "COMMON_FLAGS", (*builder.COMMON_FLAGS, "-g"))
    return {}


def changed_compiler(monkeypatch):
    monkeypatch.setattr(builder, "find_compiler", lambda: ("/usr/bin/g++", "g++ 99.1"))
    return {}


def changed_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9")
    return {}


INGREDIENTS = {
    "source": lambda monkeypatch: {"source": "int y;"},
    "arch": lambda monkeypatch: {"arch": "avx512"},
    "headers": lambda monkeypatch: {"headers": {"a.h": "#define A 2"}},
    "flags": changed_flags,
    "compiler": changed_compiler,
    "torch": changed_torch,
}


@pytest.mark.parametrize("name", INGREDIENTS)
def test_every_input_of_the_build_is_in_the_key(name, keys, monkeypatch):
    given = {"source": "int x;", "arch": "avx2", "headers": {"a.h": "#define A 1"}}
    assert set(given) == set(inspect.signature(builder.compile_cpp).parameters)
    assert set(given) < set(INGREDIENTS)
    monkeypatch.setattr(builder, "find_compiler", lambda: ("/usr/bin/g++", "g++ 1.0"))
    builder.compile_cpp(**given)
    builder.compile_cpp(**{**given, **INGREDIENTS[name](monkeypatch)})
    first, second = (k for k in keys if k["kind"] == "cpp-kernel")
    assert key_digest(first) != key_digest(second)


@pytest.mark.parametrize("name", builder.SEARCH_PATHS)
def test_the_search_paths_of_the_compiler_are_in_the_key(name, keys, monkeypatch):
    monkeypatch.setattr(builder, "find_compiler", lambda: ("/usr/bin/g++", "g++ 1.0"))
    for value in (None, "/one", "/two"):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
        builder.compile_cpp("int x;", "avx2", {})
    for kind in ("cpp-kernel", "cpp-stand-in"):
        assert len({key_digest(k) for k in keys if k["kind"] == kind}) == 3


VARIABLES = {
    "TILEWRIGHT_CACHE": "chooses the store, not what is in it",
    "TILEWRIGHT_DUMP": "writes graphs beside the compilation",
    "TILEWRIGHT_FUEL": "is CompileOptions.fuel, below",
    "TILEWRIGHT_WHY": "logs refusals",
}


def test_every_environment_variable_is_in_a_key_or_has_a_reason():
    assert {v.name for v in settings.VARIABLES} == set(VARIABLES)


# GGUF files turned into safetensors


def test_a_converted_gguf_file_is_keyed_by_file_versions_and_converter(keys, monkeypatch, tmp_path):
    path = tmp_path / "model.gguf"

    def asked():
        with monkeypatch.context() as patch:
            patch.setattr(hugging_face, "load_folder", lambda folder, name: None)
            hugging_face.load_gguf(path)
        return key_digest(keys[-1])

    def convert(path, alone, info, target):
        return None

    path.write_bytes(b"GGUF one")
    seen = [asked()]
    path.write_bytes(b"GGUF two")
    seen.append(asked())
    for package in ("transformers", "gguf", "torch"):
        known = hugging_face._version
        monkeypatch.setattr(hugging_face, "_version", lambda p, k=known, c=package: "9" if p == c else k(p))
        seen.append(asked())
    monkeypatch.setattr(hugging_face, "_convert", convert)
    seen.append(asked())
    assert len(set(seen)) == len(seen)


# Options of the compilation


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.RMSNorm(24), nn.Linear(24, 8), nn.Linear(24, 8)

    def forward(self, x, y):
        h = self.norm(x + y)
        return self.a(h) * torch.sigmoid(self.b(h))


PLAIN = {"pipeline": "exact", "lower": "eager"}
CHANGES_WHAT_RUNS = {
    "pipeline": "gqa-unrepeat",
    "fuel": 0,
    "kernels": False,
    "lower": "inductor",
}
"""Another value of an option that decides what is compiled: it must show in the chosen kernels."""

CHANGES_NOTHING = {
    "facts": (
        {"video_grid": (1, 2, 2)},
        "read by passes; what they rewrite because of it is the program itself",
    ),
    "verify": ("shapes", "checks the program"),
    "replay": (False, "checks the rewrites"),
    "on_pass_error": ("skip", "no pass fails here; a skipped one changes the program itself"),
    "costs": (True, "describes the program in the report"),
    "keep_graphs": (True, "prints the program into the report"),
    "require": ({"rms_norm": 1}, "an error or nothing"),
}
"""Another value of an option that must not reach a key, and why."""


def chosen(**options):
    torch._dynamo.reset()
    report = explain(Small(), (torch.randn(2, 24), torch.randn(2, 24)), **{**PLAIN, **options})
    return [(row["op"], row["kernel"]) for row in report.kernels]


def test_every_option_of_the_compilation_has_a_row():
    names = {f.name for f in dataclasses.fields(CompileOptions)}
    assert names == {*CHANGES_WHAT_RUNS, *CHANGES_NOTHING}


@pytest.fixture(scope="module")
def plain():
    return chosen()


@needs_kernels
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(CompileOptions)])
def test_options_change_the_kernels_or_nothing(name, plain):
    assert any(kernel.startswith("add_rms_norm_") for _, kernel in plain)
    if name in CHANGES_WHAT_RUNS:
        assert chosen(**{name: CHANGES_WHAT_RUNS[name]}) != plain
    else:
        assert chosen(**{name: CHANGES_NOTHING[name][0]}) == plain


# Options of the passes


def other_value(value, hint):
    """A value of an option's type that differs from `value`; whether the pass takes it does not matter."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in args if a is not type(None)]
        return other_value(value, kinds[0])
    if origin is typing.Literal:
        return next(a for a in args if a != value)
    if origin is tuple:
        count = 2 if args[-1] is Ellipsis else len(args)
        old = value if isinstance(value, tuple) and len(value) == count else (None,) * count
        return tuple(other_value(v, args[0] if args[-1] is Ellipsis else args[i]) for i, v in enumerate(old))
    if hint is bool:
        return not value
    if hint in (int, float):
        return hint((value if isinstance(value, (int, float)) else 1) + 3)
    assert hint is str, f"say how to change an option of type {hint}"
    return "other"


def option_fields():
    for name, cls in registry.load_all().items():
        for field in dataclasses.fields(cls):
            yield pytest.param(cls, field, id=f"{name}-{field.name}")


@pytest.mark.parametrize(("cls", "field"), option_fields())
def test_every_option_of_a_pass_is_in_the_pipeline_text(cls, field):
    """The text is what names a pipeline: it changes with each option, whose part of it parses back."""
    hint = typing.get_type_hints(cls)[field.name]
    first, second = object.__new__(cls), object.__new__(cls)
    for f in dataclasses.fields(cls):
        default = f.default if f.default is not dataclasses.MISSING else None
        first.__dict__[f.name] = second.__dict__[f.name] = default
    value = second.__dict__[field.name] = other_value(first.__dict__[field.name], hint)
    assert first.text() != second.text()
    assert first != second
    ((_, options),) = split_pipeline(second.text())
    assert parse_value(cls.name, field.name, options[field.name], hint) == value
