"""The semantic ops as callables for patterns, replacements and plain use: `ops.attention(q, k, v, ...)`."""

from __future__ import annotations

from tilewright.compiler.ops import attention as _attention
from tilewright.compiler.ops import attention_mass as _attention_mass
from tilewright.compiler.ops import block_mass as _block_mass
from tilewright.compiler.ops import block_sparse_attention as _block_sparse
from tilewright.compiler.ops import cache as _cache
from tilewright.compiler.ops import early_exit as _early_exit
from tilewright.compiler.ops import hadamard as _hadamard
from tilewright.compiler.ops import linear as _linear
from tilewright.compiler.ops import measured_copy as _measured_copy
from tilewright.compiler.ops import merge_parts as _merge_parts
from tilewright.compiler.ops import mlp as _mlp
from tilewright.compiler.ops import norm as _norm
from tilewright.compiler.ops import packed as _packed
from tilewright.compiler.ops import paged as _paged
from tilewright.compiler.ops import pick_pages as _pick_pages
from tilewright.compiler.ops import quantized_attention as _quantized_attention
from tilewright.compiler.ops import quantized_linear as _quantized_linear
from tilewright.compiler.ops import rope as _rope
from tilewright.compiler.ops import rotate_rows as _rotate_rows
from tilewright.compiler.ops import step_reuse as _step_reuse
from tilewright.compiler.ops import step_state as _step_state
from tilewright.compiler.ops.registry import SemanticOp, all_ops, semantic_op

attention = _attention.attention.overload
block_sparse_attention = _block_sparse.block_sparse_attention.overload
block_sparse_attention_backward = _block_sparse.block_sparse_attention_backward.overload
block_sparse_attention_fp8 = _quantized_attention.block_sparse_attention_fp8.overload
block_sparse_attention_int8 = _quantized_attention.block_sparse_attention_int8.overload
merge_attention = _block_sparse.merge_attention.overload
measured_copy = _measured_copy.measured_copy.overload
merge_parts = _merge_parts.merge_parts.overload
block_mass = _block_mass.block_mass.overload
early_exit_begin = _early_exit.early_exit_begin.overload
early_exit_end = _early_exit.early_exit_end.overload
early_exit_select = _early_exit.early_exit_select.overload
step_reuse_begin = _step_reuse.step_reuse_begin.overload
step_reuse_end = _step_reuse.step_reuse_end.overload
step_reuse_end_beside = _step_reuse.step_reuse_end_beside.overload
step_state_get = _step_state.step_state_get.overload
step_state_put = _step_state.step_state_put.overload
linear = _linear.linear.overload
linear_multi = _linear.linear_multi.overload
embedding = _linear.embedding.overload
quantized_linear = _quantized_linear.quantized_linear.overload
quantized_linear_multi = _quantized_linear.quantized_linear_multi.overload
rms_norm = _norm.rms_norm.overload
add_rms_norm = _norm.add_rms_norm.overload
layer_norm = _norm.layer_norm.overload
rope = _rope.rope.overload
rotate_rows = _rotate_rows.rotate_rows.overload
gated_mlp = _mlp.gated_mlp.overload
hadamard = _hadamard.hadamard.overload
kv_update = _cache.kv_update.overload
kv_round = _cache.kv_round.overload
packed_append = _packed.packed_append.overload
packed_attention = _packed.packed_attention.overload
paged_attention = _paged.paged_attention.overload
token_attention = _paged.token_attention.overload
paged_append = _paged.paged_append.overload
page_bounds = _paged.page_bounds.overload
top_pages = _paged.top_pages.overload
pick_pages = _pick_pages.pick_pages.overload
attention_mass = _attention_mass.attention_mass.overload

__all__ = [
    "SemanticOp",
    "add_rms_norm",
    "all_ops",
    "attention",
    "attention_mass",
    "block_mass",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "block_sparse_attention_fp8",
    "block_sparse_attention_int8",
    "early_exit_begin",
    "early_exit_end",
    "early_exit_select",
    "embedding",
    "gated_mlp",
    "hadamard",
    "kv_round",
    "kv_update",
    "layer_norm",
    "linear",
    "linear_multi",
    "merge_attention",
    "measured_copy",
    "merge_parts",
    "packed_append",
    "packed_attention",
    "page_bounds",
    "paged_append",
    "paged_attention",
    "pick_pages",
    "quantized_linear",
    "quantized_linear_multi",
    "rms_norm",
    "rope",
    "rotate_rows",
    "semantic_op",
    "step_reuse_begin",
    "step_reuse_end",
    "step_reuse_end_beside",
    "step_state_get",
    "step_state_put",
    "token_attention",
    "top_pages",
]
