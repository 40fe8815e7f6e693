"""Named pipelines. Each is one readable page of pass names; use a preset wherever a pass name may stand."""

from __future__ import annotations

PRESETS: dict[str, str] = {
    # What every captured program goes through first: one spelling per meaning, then semantic ops.
    "normal-form": "eliminate-noop,fold-constants,match-embedding,match-linear,match-layer-norm,"
    "match-rms-norm,match-rope,match-attention,match-gated-mlp,match-kv-update,common-subexpression,"
    "dead-code",
    # Exact rewrites that pay on every model.
    "exact": "gqa-unrepeat,common-subexpression,dead-code,fuse-add-rmsnorm,fuse-projections",
}
