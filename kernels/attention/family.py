"""attention as a kernel family: prefill and diffusion shapes without a mask, up to 512 queries under one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler import known_equal
from tilewright.compiler.ops import all_ops
from tilewright.kernels.attention import cpp_masked
from tilewright.kernels.block_sparse_attention import cpp
from tilewright.kernels.block_sparse_attention.family import DTYPES, MAX_HEAD, head_sizes
from tilewright.kernels.block_sparse_attention.signature import schema
from tilewright.kernels.common.family import KernelFamily, check_target, config_of, dtype_name, make_key
from tilewright.kernels.paged.family import check_sizes, sized_key
from tilewright.runtime.contracts import KernelKey, Refusal, Target

MIN_QUERIES, MIN_PAIRS = 64, 1 << 16
"""Without a mask. Below, packing the keys costs more than it saves."""
MOST_QUERIES = 512
"""Under a mask. Up to here it beats keys packed for all queries, even where it hides little from all."""
LEGALITY = (
    "q, k and v are [B, H, S, D], [B, Hkv, T, D], [B, Hkv, T, E] of one dtype: float32, bfloat16 or float16",
    f"D and E are known, multiples of 8 and at most {MAX_HEAD}; H is a multiple of Hkv",
    "no sinks, no softcap; causal only with as many queries as keys and no mask",
    f"without a mask: lengths are known, with at least {MIN_QUERIES} queries and {MIN_PAIRS} pairs of query "
    "and key",
    f"under a mask (bool, float32 or the dtype of q) with a column for every key: at most {MOST_QUERIES} "
    "queries; any number of keys, known or not",
)


def _size_refusal(q: Tensor, k: Tensor, causal: bool) -> Refusal | None:
    queries, keys = q.shape[2], k.shape[2]
    if not (isinstance(queries, int) and isinstance(keys, int)):
        return Refusal(f"lengths {queries} and {keys} are not known when compiling")
    if causal and queries != keys:
        return Refusal(f"causal with {queries} queries and {keys} keys; the kernel takes equal lengths")
    if queries < MIN_QUERIES or queries * keys < MIN_PAIRS:
        return Refusal(
            f"{queries} queries and {keys} keys: below {MIN_QUERIES} queries or {MIN_PAIRS} pairs "
            "torch's own attention costs less"
        )
    return None


def _configure_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool, dtype: str, target: Target
) -> KernelKey | Refusal:
    queries, keys, columns = q.shape[2], k.shape[2], mask.shape[-1] if mask.dim() else 1
    if causal:
        return Refusal("causal and a mask in one call; the kernel takes one of them")
    if not isinstance(queries, int) or queries > MOST_QUERIES:
        return Refusal(f"{queries} queries under a mask; the kernel takes at most {MOST_QUERIES}")
    if mask.dim() > 4 or not known_equal(columns, keys):
        return Refusal(f"the mask has shape {tuple(mask.shape)}; a column for each of {keys} keys is needed")
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        return Refusal(f"the mask is {mask.dtype}; the kernel takes bool, float32 or the dtype of q")
    if k.stride(3) != 1 or v.stride(3) != 1:
        return Refusal("the last axis of k or v is not contiguous; the kernel reads rows in place")
    head, value = int(q.shape[3]), int(v.shape[3])
    refused = check_sizes({"head": head, "value": value})
    if refused is not None:
        return refused
    shown = str(mask.dtype).removeprefix("torch.")
    return sized_key("attention", target, dtype, layout="masked", head=head, value=value, mask=shown)


def _configure(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    q, k, v, mask, _, causal, softcap, sinks = args
    refused = check_target([q, k, v], target)
    if refused is not None:
        return refused
    if target.kind != "cpu":
        return Refusal(f"on {target} torch's own flash attention runs; this kernel is for the CPU")
    dtype = dtype_name(q, DTYPES, "q")
    if isinstance(dtype, Refusal):
        return dtype
    for name, value in (("sinks", sinks), ("a softcap", softcap or None)):
        if value is not None:
            return Refusal(f"the call has {name}; the kernel takes none")
    sizes = head_sizes(q, k, v)
    if isinstance(sizes, Refusal):
        return sizes
    if mask is not None:
        return _configure_masked(q, k, v, mask, causal, dtype, target)
    refused = _size_refusal(q, k, causal)
    if refused is not None:
        return refused
    return make_key(
        "attention",
        target,
        dtype,
        layout="causal" if causal else "dense",
        head=sizes[0],
        value=sizes[1],
    )


def _rewrite_args(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
    scale = config_of(key)["head"] ** -0.5 if args[4] is None else args[4]
    if config_of(key)["layout"] == "masked":
        return (*args[:4], scale)
    return (*args[:3], scale)


def _schema(key: KernelKey) -> str:
    return cpp_masked.schema() if config_of(key)["layout"] == "masked" else schema(key)


def _generate(key: KernelKey, op: str) -> str:
    masked = config_of(key)["layout"] == "masked"
    return cpp_masked.generate(key, op) if masked else cpp.generate(key, op)


def _fake(key: KernelKey) -> Callable[..., Any]:
    if config_of(key)["layout"] == "masked":
        return lambda q, k, v, mask, scale: q.new_empty((*q.shape[:3], v.shape[3]))

    def fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        batch, heads, queries = q.shape[:3]
        if q.stride(1) < q.stride(2):  # heads inside rows, and so is the result
            return q.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)
        return q.new_empty((batch, heads, queries, v.shape[3]))

    return fake


def _save(key: KernelKey) -> Callable[..., None]:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:-1])
        ctx.scale = inputs[-1]

    return save


def _backward(key: KernelKey) -> Callable[..., Any]:
    """torch's own gradient of the definition, which runs again."""
    causal = config_of(key)["layout"] == "causal"

    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
            mask = inputs[3] if len(inputs) > 3 else None
            out = all_ops()["attention"].definition(*inputs[:3], mask, ctx.scale, causal)
            wanted = [x for x in inputs if x.requires_grad]
            found = iter(torch.autograd.grad(out, wanted, dout))
            return (*[next(found) if x.requires_grad else None for x in inputs], None)

    return backward


def _examples() -> Sequence[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for dtype, head, value in ((torch.float32, 64, 64), (torch.bfloat16, 128, 128), (torch.float16, 64, 128)):
        q = torch.empty(1, 9, 512, head, dtype=dtype, device="meta")
        k, v = (torch.empty(1, 3, 512, n, dtype=dtype, device="meta") for n in (head, value))
        found += [(q, k, v, None, None, causal, 0.0, None) for causal in (False, True)]
        row, shown = q[:, :, :1], torch.empty(1, 1, 1, 512, dtype=torch.bool, device="meta")
        found += [(row, k, v, mask, None, False, 0.0, None) for mask in (shown, shown.to(dtype))]
    return found


ATTENTION = KernelFamily(
    op="attention",
    dtypes=DTYPES,
    legality=LEGALITY,
    configure=_configure,
    schema=_schema,
    generate={"cpu": _generate},
    triton=None,
    fake=_fake,
    save=_save,
    backward=_backward,
    rewrite_args=_rewrite_args,
    examples=_examples,
)
