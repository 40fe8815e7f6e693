"""block_sparse_attention and its gradient as kernel families: selection, shapes, autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler import ops
from tilewright.compiler.block_layout import WIDTH, BlockLayout, unflatten
from tilewright.compiler.diagnostics import OptionError
from tilewright.kernels.block_sparse_attention import cpp, triton, triton_backward
from tilewright.kernels.block_sparse_attention.by_key import row_sums, rows_by_key
from tilewright.kernels.block_sparse_attention.signature import (
    OPTIONAL,
    RULE_FIELDS,
    backward_schema,
    kinds_of,
    options_of,
    schema,
)
from tilewright.kernels.common.family import (
    FP8_ARCHS,
    KernelFamily,
    TritonKernel,
    check_target,
    dtype_name,
    make_key,
)
from tilewright.kernels.load import build_kernel
from tilewright.runtime.contracts import KernelKey, Refusal, Target

DTYPES = ("float32", "bfloat16", "float16")
MAX_HEAD = 256
ARGUMENTS = ("q", "k", "v", "row_ptr", "col", "q_off", "k_off", "head_group", "flag", "predicates")
NAMES = (*ARGUMENTS, "k_valid", "q_valid", "limit", "src_q", "src_k", "mask", "scale")
LEGALITY = (
    "q, k and v are [B, H, S, D], [B, Hkv, T, D], [B, Hkv, T, E] of one dtype: float32, bfloat16 or float16",
    f"D and E are known, multiples of 8 and at most {MAX_HEAD}",
    "layout tensors are int32, the mask bool, on the device of q; predicates are known",
    "an input whose last axis is not contiguous is copied inside the op",
)


def head_sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int] | Refusal:
    """(D, E) when the kernels take them and q, k, v fit each other."""
    if not q.dim() == k.dim() == v.dim() == 4:
        return Refusal(f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} axes; the kernels take 4")
    if not q.dtype == k.dtype == v.dtype:
        return Refusal(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; the kernels take one dtype")
    sizes = (q.shape[3], k.shape[3], v.shape[3])
    if not all(isinstance(n, int) for n in sizes):
        return Refusal(f"head sizes {sizes} are not known when compiling")
    if sizes[0] != sizes[1] or any(n % 8 or not 8 <= n <= MAX_HEAD for n in sizes):
        return Refusal(
            f"head sizes of q, k, v are {sizes}; equal for q and k, multiples of 8, 8 to {MAX_HEAD}"
        )
    heads = (q.shape[1], k.shape[1])
    if all(isinstance(n, int) for n in heads) and (heads[1] == 0 or heads[0] % heads[1]):
        return Refusal(f"{heads[0]} query heads over {heads[1]} key heads; a multiple is needed")
    return int(sizes[0]), int(sizes[2])


def descriptor_refusal(target: Target, dtype: str, gathered: bool) -> Refusal | None:
    """Why whole steps of keys are not loaded by tensor descriptors, or None."""
    if target.arch == "sm_120":
        return Refusal(
            "products of sm_120 read registers: a box in shared memory is one copy more, and spills"
        )
    if target.arch not in ("sm_90", "sm_100"):
        return Refusal(f"{target} has no tensor memory accelerator, sm_90 and later have")
    if gathered:
        return Refusal("keys are gathered through src_k: their rows are not one box of memory")
    if dtype == "float32":
        return Refusal("float32 products run without tensor cores: loads are not what they wait for")
    return None


def without(key: KernelKey, *names: str) -> KernelKey:
    """The key with options off."""
    return replace(key, config=tuple((n, False if n in names else value) for n, value in key.config))


def without_descriptors(key: KernelKey) -> KernelKey:
    """The key whose kernel takes pointers and numbers only."""
    return without(key, "descriptor")


def _configure(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    given = dict(zip(NAMES, args, strict=True))
    refused = check_target([t for t in given.values() if isinstance(t, Tensor)], target)
    if refused is not None:
        return refused
    dtype = dtype_name(given["q"], DTYPES, "q")
    if isinstance(dtype, Refusal):
        return dtype
    sizes = head_sizes(given["q"], given["k"], given["v"])
    if isinstance(sizes, Refusal):
        return sizes
    for name in NAMES[3:]:
        value = given[name]
        wanted = torch.bool if name == "mask" else torch.int32
        if isinstance(value, Tensor) and value.dtype != wanted:
            return Refusal(f"{name} is {value.dtype}; it must be {wanted}")
    table = given["predicates"]
    if not all(isinstance(n, int) for n in table):
        return Refusal("the predicates are not known when compiling")
    try:
        kinds = "".join(str(int(rule.kind)) for rule in unflatten(table))
    except OptionError as error:
        return Refusal(error.message)
    if kinds and given["flag"] is None:
        kinds = ""  # nothing refers to them
    if len(kinds) > 9:
        return Refusal(f"{len(kinds)} predicates; the kernels take 9")
    present = {name: given[name] is not None for name in OPTIONAL}
    present["flag"] = bool(kinds)
    present["limit"] = present["limit"] and "4" in kinds
    present["mask"] = present["mask"] and "5" in kinds
    if target.kind != "cpu":
        present["descriptor"] = descriptor_refusal(target, dtype, present["src_k"]) is None
        present["short"] = _short_blocks(given)
    return make_key(
        "block_sparse_attention",
        target,
        dtype,
        head=sizes[0],
        value=sizes[1],
        kinds=f"k{kinds}",
        **present,
    )


def _short_blocks(given: dict[str, Any]) -> bool:
    """Whether a block of queries has 64 slots or fewer on average; False where sizes are not known."""
    slots = given["q"].shape[2] if given["src_q"] is None else given["src_q"].shape[1]
    count = given["q_off"].shape[1] - 1
    return isinstance(slots, int) and isinstance(count, int) and slots <= 64 * count


def _rewrite_args(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
    config, given = options_of(key), dict(zip(NAMES, args, strict=True))
    tensors = [given[name] for name in NAMES[:8]]
    tensors += [given[name] for name in OPTIONAL if config[name]]
    rows = [given["predicates"][at : at + WIDTH] for at in range(0, WIDTH * len(kinds_of(key)), WIDTH)]
    scale = config["head"] ** -0.5 if given["scale"] is None else given["scale"]
    return (*tensors, *[value for row in rows for value in row[1:]], scale)


def _restore(key: KernelKey, given: Sequence[Any]) -> tuple[Any, ...]:
    """Inverse of `_rewrite_args`: kernel-op arguments as the semantic op's."""
    config, rest = options_of(key), iter(given)
    named = {name: next(rest) for name in NAMES[:8]}
    named |= {name: next(rest) for name in OPTIONAL if config[name]}
    table: list[int] = []
    for kind in kinds_of(key):
        table += [int(kind), *[next(rest) for _ in RULE_FIELDS]]
    named |= {"predicates": table, "scale": next(rest)}
    return tuple(named.get(name) for name in NAMES)


def _fake(key: KernelKey) -> Callable[..., Any]:
    def fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        shape = (*q.shape[:3], v.shape[3])
        return q.new_empty(shape), q.new_empty(q.shape[:3], dtype=torch.float32)

    return fake


def _save(key: KernelKey) -> Callable[..., None]:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        count = len([a for a in inputs if isinstance(a, Tensor)])
        ctx.save_for_backward(*inputs[:count], *output)
        ctx.constants = inputs[count:]

    return save


def _backward(key: KernelKey) -> Callable[..., Any]:
    """The gradient of the semantic op: its own on the CPU, the generated kernel on a GPU."""

    def definition(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        *inputs, out, lse = ctx.saved_tensors
        q, k, v, *layout = _restore(key, (*inputs, *ctx.constants))
        dout = torch.zeros_like(out) if dout is None else dout
        grads = ops.block_sparse_attention_backward(dout, dlse, q, k, v, out, lse, *layout)
        return (*grads, *[None] * (len(inputs) - 3 + len(ctx.constants)))

    def generated(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        *inputs, out, lse = ctx.saved_tensors
        q, k, v, row_ptr, col, _, k_off, _, *rest = inputs
        dout = torch.zeros_like(out) if dout is None else dout
        flag = rest[0] if options_of(key)["flag"] else None
        # In plain tensor ops, so that a compiler fuses the sums and layers with one layout share its rows.
        prepared = (row_sums(dout, dlse, out), *rows_by_key(row_ptr, col, flag, k_off.shape[1] - 1))
        kernel = build_kernel(BLOCK_SPARSE_ATTENTION_BACKWARD, _backward_key(key)).op
        grads = kernel(dout, dlse, q, k, v, out, lse, *inputs[3:], *ctx.constants, *prepared)
        return (*grads, *[None] * (len(inputs) - 3 + len(ctx.constants)))

    return definition if key.target.kind == "cpu" else generated


def _examples() -> Sequence[tuple[Any, ...]]:
    found = []
    for dtype, size in ((torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 64)):
        q = torch.empty(1, 4, 512, size, dtype=dtype, device="meta")
        layout = BlockLayout.causal(512, 512, 4, window=256, sink=16)
        plain = BlockLayout.dense(512, 512, 4)
        for one in (plain, layout):
            moved = [a.to("meta") if isinstance(a, Tensor) else a for a in one.arguments()]
            found.append((q, q, q, *moved, None))
    return found


BLOCK_SPARSE_ATTENTION = KernelFamily(
    op="block_sparse_attention",
    dtypes=DTYPES,
    legality=LEGALITY,
    configure=_configure,
    schema=schema,
    generate={"cpu": cpp.generate, "cuda": triton.generate, "hip": triton.generate},
    triton=TritonKernel(
        triton.parameters,
        triton.constants,
        triton.warps,
        triton.launcher,
        portable=without_descriptors,
    ),
    fake=_fake,
    save=_save,
    backward=_backward,
    rewrite_args=_rewrite_args,
    examples=_examples,
)

_BACKWARD = "block_sparse_attention_backward"


def _configure_backward(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    dout, dlse, q, k, v, out, lse, *layout = args
    if target.kind == "cpu":
        return Refusal("the gradient on a CPU is the definition's; kernels are generated for GPUs")
    if not dout.dtype == out.dtype == q.dtype or lse.dtype != torch.float32:
        return Refusal(f"dout, out, lse are {dout.dtype}, {out.dtype}, {lse.dtype}; {q.dtype} twice, float32")
    refused = check_target([x for x in (dout, dlse, out, lse) if x is not None], target)
    key = _configure([q, k, v, *layout], target) if refused is None else refused
    return key if isinstance(key, Refusal) else _backward_key(key)


def _backward_key(key: KernelKey) -> KernelKey:
    """The key of the gradient of a key's kernel."""
    config = tuple(item for item in key.config if item[0] not in ("descriptor", "short"))
    return replace(key, op=_BACKWARD, config=config)


def _rewrite_backward(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
    dout, dlse, q, k, v, out, lse, *layout = args
    return (dout, dlse, q, k, v, out, lse, *_rewrite_args(key, (q, k, v, *layout))[3:])


def _fake_backward(key: KernelKey) -> Callable[..., Any]:
    def fake(dout: Tensor, dlse: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    return fake


def _backward_examples() -> Sequence[tuple[Any, ...]]:
    found = []
    for q, k, v, *layout in _examples():
        lse = torch.empty(q.shape[:3], device="meta")
        found.append((q, None, q, k, v, q, lse, *layout))
    return found


BLOCK_SPARSE_ATTENTION_BACKWARD = KernelFamily(
    op=_BACKWARD,
    dtypes=DTYPES,
    legality=(*LEGALITY, "dout and out have the dtype of q, lse is float32; GPUs only"),
    configure=_configure_backward,
    schema=backward_schema,
    generate={"cuda": triton_backward.generate, "hip": triton_backward.generate},
    triton=TritonKernel(
        triton_backward.parameters,
        triton_backward.constants,
        triton.warps,
        triton_backward.launcher,
        options=triton_backward.launch_options,
    ),
    fake=_fake_backward,
    save=None,
    backward=None,
    rewrite_args=_rewrite_backward,
    examples=_backward_examples,
)


def _configure_codes(op: str, args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    if target.kind == "cpu":
        return Refusal("8-bit products of scores gain nothing over float32 ones on AVX2; GPUs only")
    key = _configure(args, target)
    if isinstance(key, Refusal):
        return key
    if key.dtype == "float32":
        return Refusal("q is float32: values would be multiplied without tensor cores; 16 bits only")
    key = replace(key, op=op)
    # A box of codes steps over rows of a multiple of 16 bytes.
    return key if options_of(key)["head"] % 16 == 0 else without_descriptors(key)


def _configure_int8(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    return _configure_codes("block_sparse_attention_int8", args, target)


def _configure_fp8(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    if target.kind != "cpu" and target.arch not in FP8_ARCHS:
        return Refusal(f"{target} has no products of OCP e4m3, {', '.join(FP8_ARCHS)} have; int8 runs there")
    return _configure_codes("block_sparse_attention_fp8", args, target)


def _code_examples() -> Sequence[tuple[Any, ...]]:
    return [args for args in _examples() if args[0].dtype != torch.float32]


BLOCK_SPARSE_ATTENTION_INT8 = replace(
    BLOCK_SPARSE_ATTENTION,
    op="block_sparse_attention_int8",
    dtypes=DTYPES[1:],
    legality=(*LEGALITY, "16 bits; for inference, on GPUs only"),
    configure=_configure_int8,
    generate={"cuda": triton.generate, "hip": triton.generate},
    save=None,
    backward=None,
    examples=_code_examples,
)

BLOCK_SPARSE_ATTENTION_FP8 = replace(
    BLOCK_SPARSE_ATTENTION_INT8,
    op="block_sparse_attention_fp8",
    configure=_configure_fp8,
    generate={"cuda": triton.generate},
    archs=FP8_ARCHS,
)
