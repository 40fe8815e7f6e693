"""attention as a kernel family: prefill and diffusion shapes without a mask, or causal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.ops import all_ops
from tilewright.kernels.block_sparse_attention import cpp
from tilewright.kernels.block_sparse_attention.family import DTYPES, MAX_HEAD, head_sizes
from tilewright.kernels.block_sparse_attention.signature import schema
from tilewright.kernels.common.family import KernelFamily, check_target, config_of, dtype_name, make_key
from tilewright.runtime.contracts import KernelKey, Refusal, Target

MIN_QUERIES, MIN_PAIRS = 64, 1 << 16
"""Below, packing the keys costs more than it saves."""
LEGALITY = (
    "q, k and v are [B, H, S, D], [B, Hkv, T, D], [B, Hkv, T, E] of one dtype: float32, bfloat16 or float16",
    f"D and E are known, multiples of 8 and at most {MAX_HEAD}; H is a multiple of Hkv",
    "no mask, no sinks, no softcap; causal only with as many queries as keys",
    f"lengths are known, with at least {MIN_QUERIES} queries and {MIN_PAIRS} pairs of query and key",
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
    for name, value in (("a mask", mask), ("sinks", sinks), ("a softcap", softcap or None)):
        if value is not None:
            return Refusal(f"the call has {name}; the kernel takes none")
    sizes = head_sizes(q, k, v)
    if isinstance(sizes, Refusal):
        return sizes
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
    return (*args[:3], scale)


def _fake(key: KernelKey) -> Callable[..., Any]:
    def fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        batch, heads, queries = q.shape[:3]
        if q.stride(1) < q.stride(2):  # heads inside rows, and so is the result
            return q.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)
        return q.new_empty((batch, heads, queries, v.shape[3]))

    return fake


def _save(key: KernelKey) -> Callable[..., None]:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.scale = inputs[3]

    return save


def _backward(key: KernelKey) -> Callable[..., Any]:
    """torch's own gradient of the definition, which runs again."""
    causal = config_of(key)["layout"] == "causal"

    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out = all_ops()["attention"].definition(*inputs, None, ctx.scale, causal)
            return (*torch.autograd.grad(out, inputs, dout), None)

    return backward


def _examples() -> Sequence[tuple[Any, ...]]:
    found = []
    for dtype, head, value in ((torch.float32, 64, 64), (torch.bfloat16, 128, 128), (torch.float16, 64, 128)):
        q = torch.empty(1, 9, 512, head, dtype=dtype, device="meta")
        k, v = (torch.empty(1, 3, 512, n, dtype=dtype, device="meta") for n in (head, value))
        found += [(q, k, v, None, None, causal, 0.0, None) for causal in (False, True)]
    return found


ATTENTION = KernelFamily(
    op="attention",
    dtypes=DTYPES,
    legality=LEGALITY,
    configure=_configure,
    schema=schema,
    generate={"cpu": cpp.generate},
    triton=None,
    fake=_fake,
    save=_save,
    backward=_backward,
    rewrite_args=_rewrite_args,
    examples=_examples,
)
