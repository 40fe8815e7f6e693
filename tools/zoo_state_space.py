"""Recurrent and state-space language models of the zoo, and one hybrid with attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tilewright.tools.zoo_entry import (
    BATCH,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    MLP,
    SEQ,
    VOCAB,
    Inputs,
    ZooEntry,
    counts,
    from_config,
    tokens,
)

LAYERS = 2


def _inputs() -> Inputs:
    return (tokens(BATCH, SEQ),), {"use_cache": False, "return_dict": False}


def entries() -> list[ZooEntry]:
    """Mamba, Mamba2, Falcon-Mamba, RWKV, and LFM2 (short convolutions beside attention)."""
    base = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    mamba = {**base, "state_size": 4, "conv_kernel": 3, "time_step_rank": 5}
    mamba2 = {
        **base,
        "state_size": 4,
        "conv_kernel": 3,
        "head_dim": HEAD_DIM,
        "num_heads": 12,
        "n_groups": 1,
        "chunk_size": 4,
    }
    rwkv = {**base, "attention_hidden_size": HIDDEN, "intermediate_size": MLP, "context_length": 32}
    lfm2 = {
        **base,
        "intermediate_size": MLP,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 32,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    }
    head = {"linear": 1, "rms_norm": 1, "embedding": 1}
    # in, x, dt and out projections (dt as `weight @ x`), and scan * silu(gate).
    selective = {"linear": 4, "rms_norm": 1, "gated_mlp": 1}
    return [
        _entry("mamba", "Mamba", mamba, counts((LAYERS, selective), (1, head))),
        # Falcon-Mamba normalises dt, B and C as well.
        _entry(
            "falcon-mamba", "FalconMamba", mamba, counts((LAYERS, {**selective, "rms_norm": 4}), (1, head))
        ),
        # Two linears; the inner norm is gated: rms_norm(x * silu(gate)).
        _entry(
            "mamba2",
            "Mamba2",
            mamba2,
            counts((LAYERS, {"linear": 2, "rms_norm": 2, "gated_mlp": 1}), (1, head)),
        ),
        # Time mixing: receptance, key, value, output. Channel mixing: key, receptance, value, and the
        # product sigmoid(receptance) * value. One more norm before the first block.
        _entry(
            "rwkv",
            "Rwkv",
            rwkv,
            counts(
                (LAYERS, {"linear": 7, "layer_norm": 2, "gated_mlp": 2}),
                (1, {"linear": 1, "layer_norm": 2, "embedding": 1}),
            ),
        ),
        _entry(
            "lfm2",
            "Lfm2",
            lfm2,
            counts(
                (LAYERS, {"linear": 3, "rms_norm": 2, "gated_mlp": 1}),
                (1, {"linear": 2}),
                (1, {"attention": 1, "linear": 4, "rms_norm": 2, "rope": 2}),
                (1, head),
            ),
        ),
    ]


def _entry(name: str, kind: str, settings: Mapping[str, Any], expected: dict[str, int]) -> ZooEntry:
    return ZooEntry(
        name=name,
        family="state-space",
        build=from_config(f"{kind}ForCausalLM", f"{kind}Config", settings),
        inputs=_inputs,
        expected=expected,
        layers=LAYERS,
    )
