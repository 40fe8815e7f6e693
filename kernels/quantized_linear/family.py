"""quantized_linear and quantized_linear_multi as kernel families: selection, shapes, gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.float_format import AnyFormat, FloatFormat, parse_format
from tilewright.compiler.weight_format import WeightFormat
from tilewright.kernels.common.family import (
    KernelFamily,
    TritonKernel,
    check_target,
    config_of,
    dtype_name,
    make_key,
)
from tilewright.kernels.quantized_linear import cpp, cpp_float, triton, triton_float
from tilewright.runtime.contracts import KernelKey, Refusal, Target

DTYPES = ("float32", "bfloat16", "float16")
MAX_WEIGHTS = 8
PACKING = {"cpu": "blocks8", "cuda": "rows", "hip": "rows"}
ACTIVATION_WORD = {
    "none": "none",
    "int8-token": "token",
    "int8-group": "group",
    "int4-token": "token4",
    "int8-static": "static",
}
FLOAT_WORD = {"fp8-e4m3": "e4m3", "fp8-e5m2": "e5m2", "nvfp4": "nvfp4"}
LEGALITY = (
    "x and biases have one dtype: float32, bfloat16 or float16 (accumulated in int32 and float32)",
    "any number of rows of x, symbolic too; the number of columns is known when compiling",
    "weights are packed as blocks8 on the CPU, as rows on a GPU; small floats as rows everywhere",
    "each bias is absent or [rows]",
    f"quantized_linear_multi: 2 to {MAX_WEIGHTS} weights of one format",
    "an x that is not contiguous is copied inside the op",
    "quantized_linear_multi: weights for static activations hold one step",
)


def _weight_refusal(
    form: AnyFormat, packed: Tensor, bias: Tensor | None, rows: int, x: Tensor, i: int
) -> Refusal | None:
    wanted, problem = form.shape(rows, int(x.shape[-1])), None
    if isinstance(form, FloatFormat):
        problem = form.problem(int(x.shape[-1]))
    if problem is not None:
        return Refusal(f"weight {i} {problem}")
    if packed.dtype != torch.uint8 or list(packed.shape) != list(wanted):
        return Refusal(
            f"weight {i} is {list(packed.shape)} {packed.dtype}, {rows} rows for x need {list(wanted)} uint8"
        )
    if bias is not None and (bias.dtype != x.dtype or list(bias.shape) != [rows]):
        return Refusal(
            f"bias {i} is {list(bias.shape)} {bias.dtype}, x is {x.dtype} and there are {rows} rows"
        )
    return None


def _format_refusal(form: AnyFormat, target: Target) -> str | None:
    """Why no kernel of the target takes a format, or None."""
    if isinstance(form, FloatFormat):
        return None
    if form.packing != PACKING[target.kind]:
        return f"the weights are packed as {form.packing}, {target} wants {PACKING[target.kind]}"
    if target.kind != "cpu" and form.activation == "int8-group" and form.group > triton.LONGEST_GROUP:
        return f"activation groups of {form.group}; on a GPU at most {triton.LONGEST_GROUP}"
    return None


def _format_words(form: AnyFormat) -> dict[str, int | bool | str]:
    """What specialises a kernel for a format: `format_of` reads it."""
    if isinstance(form, FloatFormat):
        cut = form.activation != "none"
        return {"element": FLOAT_WORD[form.name], "group": form.group, "cut": cut}
    activation = ACTIVATION_WORD[form.activation]
    return {
        "bits": form.bits,
        "group": form.group,
        "offset": form.has_offset,
        "activation": activation,
        "wide": form.grid == "wide",
    }


def _configure(
    op: str,
    x: Tensor,
    packed: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rows: Sequence[int],
    text: str,
    target: Target,
) -> KernelKey | Refusal:
    refused = check_target([x, *packed, *[b for b in biases if b is not None]], target)
    if refused is not None:
        return refused
    dtype = dtype_name(x, DTYPES, "x")
    if isinstance(dtype, Refusal):
        return dtype
    try:
        form = parse_format(text)
    except OptionError as error:
        return Refusal(error.line())
    problem = _format_refusal(form, target)
    if problem is not None:
        return Refusal(problem)
    if x.dim() == 0 or len(packed) > MAX_WEIGHTS:
        return Refusal(f"x has {x.dim()} axes, there are {len(packed)} weights; at most {MAX_WEIGHTS}")
    if not isinstance(x.shape[-1], int) or x.shape[-1] == 0:
        return Refusal(f"the columns of x {list(x.shape)} are not known when compiling")
    for i, (weight, bias, count) in enumerate(zip(packed, biases, rows, strict=True)):
        refused = _weight_refusal(form, weight, bias, count, x, i)
        if refused is not None:
            return refused
    return make_key(
        op,
        target,
        dtype,
        count=len(packed),
        biases=sum(1 << i for i, bias in enumerate(biases) if bias is not None),
        **_format_words(form),
    )


def _configure_one(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    x, packed, bias, rows, text = args
    return _configure("quantized_linear", x, [packed], [bias], [rows], text, target)


def _configure_many(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    if len(args[1]) < 2:
        return Refusal(f"there are {len(args[1])} weights; the kernel takes 2 to {MAX_WEIGHTS}")
    x, packed, biases, rows, text = args
    return _configure("quantized_linear_multi", x, packed, biases, rows, text, target)


def _flat(key: KernelKey, packed: Sequence[Any], biases: Sequence[Any], rows: Sequence[Any]) -> list[Any]:
    triples = zip(packed, biases, rows, cpp.names(key), strict=True)
    return [v for w, b, n, (_, name) in triples for v in ((w, n) if name is None else (w, b, n))]


def _rewrite_one(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
    x, packed, bias, rows, _ = args
    return (x, *_flat(key, [packed], [bias], [rows]))


def _rewrite_many(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
    x, packed, biases, rows, _ = args
    return (x, *_flat(key, packed, biases, rows))


def _triples(key: KernelKey, args: Sequence[Any]) -> list[tuple[Tensor, Tensor | None, int]]:
    """(packed, bias or None, rows) of each weight from the kernel op's arguments after x."""
    rest = iter(args)
    return [(next(rest), next(rest) if bias is not None else None, next(rest)) for _, bias in cpp.names(key)]


def _fake(key: KernelKey) -> Callable[..., Any]:
    def fake(x: Tensor, *args: Any) -> Any:
        outs = [
            torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
            for _, _, rows in _triples(key, args)
        ]
        return tuple(outs) if len(outs) > 1 else outs[0]

    return fake


def format_of(key: KernelKey) -> AnyFormat:
    """The weight format of a key; one scale in all lies in memory, and is read, as one per row."""
    config = config_of(key)
    if "element" in config:
        name = next(name for name, word in FLOAT_WORD.items() if word == config["element"])
        return FloatFormat(name, config["group"], False, "fp8-token" if config["cut"] else "none")
    activation = next(name for name, word in ACTIVATION_WORD.items() if word == config["activation"])
    return WeightFormat(
        config["bits"],
        config["group"],
        "float-zero" if config["offset"] else "symmetric",
        activation,  # type: ignore[arg-type]
        PACKING[key.target.kind],  # type: ignore[arg-type]
        "wide" if config["wide"] else "short",
    )


def _save(key: KernelKey) -> Callable[..., None]:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        triples = _triples(key, inputs[1:])
        ctx.save_for_backward(inputs[0], *[packed for packed, _, _ in triples])
        ctx.rows = [rows for _, _, rows in triples]

    return save


def _backward(key: KernelKey) -> Callable[..., Any]:
    """dx = sum_i dy_i W_i, straight through the rounding of the activations; db_i = sum of dy_i over rows."""

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, *packed = ctx.saved_tensors
        form, dx, rest = format_of(key), None, list[Any]()
        for dy, weight, rows, (_, bias) in zip(grads, packed, ctx.rows, cpp.names(key), strict=True):
            if dy is not None:
                part = dy @ form.dequantize(weight, rows, x.shape[-1]).to(dy.dtype)
                dx = part if dx is None else dx + part
            summed = None if dy is None else dy.reshape(-1, rows).sum(0)
            rest += [None, *([] if bias is None else [summed]), None]
        return (dx, *rest)

    return backward


def _example(rows: Sequence[int], columns: int, form: AnyFormat, tokens: int = 1) -> tuple[Any, ...]:
    packed = [torch.empty(form.shape(n, columns), dtype=torch.uint8, device="meta") for n in rows]
    x = torch.empty(tokens, columns, device="meta")
    if len(rows) == 1:
        return x, packed[0], None, rows[0], form.text
    return x, packed, [None] * len(rows), list(rows), form.text


def _gpu_formats() -> list[AnyFormat]:
    return [
        WeightFormat(4, 32, "float-zero", "none", "rows"),
        WeightFormat(4, 32, "symmetric", "int8-group", "rows"),
        WeightFormat(8, 0, "symmetric", "int8-token", "rows"),
        WeightFormat(4, 0, "symmetric", "int4-token", "rows"),
        WeightFormat(8, 0, "symmetric", "int8-static", "rows"),
        WeightFormat(4, 32, "float-zero", "int8-static", "rows"),
        FloatFormat("fp8-e4m3"),
        FloatFormat("fp8-e4m3", activation="fp8-token"),
        FloatFormat("fp8-e5m2", 64),
        FloatFormat("nvfp4", 16),
    ]


def _examples_one() -> Sequence[tuple[Any, ...]]:
    return [_example([576], 576, form) for form in _gpu_formats()]


def _examples_many() -> Sequence[tuple[Any, ...]]:
    return [_example([576, 192, 192], 576, form) for form in _gpu_formats()]


def _triton_of(key: KernelKey) -> Any:
    """The module of the key's kernel: small floats or integers."""
    return triton_float if "element" in config_of(key) else triton


def _parameters(key: KernelKey) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = _triton_of(key).parameters(key)
    return found


def _launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    made: Callable[..., Any] = _triton_of(key).launcher(key, kernel)
    return made


def _generate_cpu(key: KernelKey, op: str) -> str:
    form = format_of(key)
    return cpp_float.generate(key, op, form) if isinstance(form, FloatFormat) else cpp.generate(key, op)


def _generate_gpu(key: KernelKey, op: str) -> str:
    text: str = _triton_of(key).generate(key, op)
    return text


def _family(op: str, configure: Any, rewrite: Any, examples: Any) -> KernelFamily:
    return KernelFamily(
        op=op,
        dtypes=DTYPES,
        legality=tuple(c for c in LEGALITY if op in c or "multi" not in c),
        configure=configure,
        schema=cpp.schema,
        generate={"cpu": _generate_cpu, "cuda": _generate_gpu, "hip": _generate_gpu},
        triton=TritonKernel(_parameters, triton.constants, triton.warps, _launcher),
        fake=_fake,
        save=_save,
        backward=_backward,
        rewrite_args=rewrite,
        examples=examples,
    )


QUANTIZED_LINEAR = _family("quantized_linear", _configure_one, _rewrite_one, _examples_one)
QUANTIZED_LINEAR_MULTI = _family("quantized_linear_multi", _configure_many, _rewrite_many, _examples_many)
