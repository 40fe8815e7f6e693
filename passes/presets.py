"""Named pipelines. Each is one readable page of pass names; use a preset wherever a pass name may stand."""

from __future__ import annotations

PRESETS: dict[str, str] = {
    # What every captured program goes through first: one spelling per meaning, then semantic ops.
    "normal-form": "eliminate-noop,fold-constants,match-embedding,match-linear,match-layer-norm,"
    "match-rms-norm,split-complex-product,match-rope,match-attention,"
    "match-ragged-attention,match-gated-mlp,match-kv-update,common-subexpression,dead-code",
    # Exact rewrites that pay on every model.
    "exact": "gqa-unrepeat,common-subexpression,dead-code,fuse-add-rmsnorm,fuse-projections",
    # Weights and activations in 8 bits, a scale per row and per token; the head too. Costs SmolLM2 4.5 to
    # 5.6 % of perplexity, by the order of sums.
    "cpu-int8": "gqa-unrepeat,common-subexpression,dead-code,"
    "quantize-linear{activation=int8-token,head=true},fuse-add-rmsnorm,fuse-projections",
    # 4-bit weights in groups of 32 with a float offset (the grid of Q4_1 files), 8-bit activations. The head
    # in 8 bits: in 4 it alone costs SmolLM2 5.5 % of perplexity.
    "cpu-int4": "gqa-unrepeat,common-subexpression,dead-code,"
    "quantize-linear{weight=int4,group=32,mode=float-zero,activation=int8-group},"
    "quantize-linear{group=32,activation=int8-group,head=true},"
    "fuse-add-rmsnorm,fuse-projections",
    # Video diffusion on a GPU: self-attention over a window of 3x3x3 tiles of 6x8x8 tokens, as Sliding Tile
    # Attention has it, tokens brought into tile order once for all layers. A canvas that the tile does not
    # divide gets smaller tiles at its border; one below 18x24x24 tokens has no three tiles and is refused.
    # Says nothing about quality: measure it on the model at hand.
    "cuda-sparse-video": "gqa-unrepeat,common-subexpression,dead-code,"
    "sliding-tile-attention{nondivisible=ceil},hoist-token-permutation,"
    "fuse-add-rmsnorm,fuse-projections",
}
