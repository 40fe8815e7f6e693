"""Causal language models of the zoo."""

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
    right_padding,
    tokens,
)

LAYERS = 2
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "use_cache": False,
}
GROUPED = {**BASE, "num_key_value_heads": KV_HEADS}
WIDE = {**GROUPED, "head_dim": HEAD_DIM}

GATED = {"attention": 1, "linear": 7, "rms_norm": 2, "rope": 2, "gated_mlp": 1}
"""A Llama block: q k v o, gate up down, two norms."""
PLAIN = {"attention": 1, "linear": 6, "layer_norm": 2}
"""q k v o, two linears of the MLP, two norms."""
RMS_HEAD = {"linear": 1, "rms_norm": 1, "embedding": 1}
LAYER_NORM_HEAD = {"linear": 1, "layer_norm": 1, "embedding": 1}


def causal_inputs() -> Inputs:
    """Token ids [5, 7], no mask: purely causal."""
    return (tokens(BATCH, SEQ),), {"use_cache": False, "return_dict": False}


def padded_inputs() -> Inputs:
    """Token ids [5, 7] with right padding."""
    return (tokens(BATCH, SEQ),), {
        "attention_mask": right_padding(),
        "use_cache": False,
        "return_dict": False,
    }


def decoder(
    name: str,
    kind: str,
    settings: Mapping[str, Any],
    block: Mapping[str, int],
    head: Mapping[str, int],
    *,
    extra: Mapping[str, int] | None = None,
    padded: bool = False,
    model_class: str = "",
    config_class: str = "",
) -> ZooEntry:
    """An entry of equal blocks, a head and what only one of the blocks has (`extra`).

    Its classes are `{kind}ForCausalLM` and `{kind}Config` unless named.
    """
    return ZooEntry(
        name=name,
        family="decoder",
        build=from_config(model_class or f"{kind}ForCausalLM", config_class or f"{kind}Config", settings),
        inputs=padded_inputs if padded else causal_inputs,
        expected=counts((LAYERS, block), (1, head), (1, extra or {})),
        layers=LAYERS,
    )


def llama_like() -> list[ZooEntry]:
    """RMS norm, rotary embedding and gated MLP, all linears apart."""
    qk_norm = {**GATED, "rms_norm": 4}
    four_norms = {**GATED, "rms_norm": 4}
    gemma3 = {**GATED, "rms_norm": 6}
    eager = {"attn_implementation": "eager"}
    sliding = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return [
        decoder("llama", "Llama", GROUPED, GATED, RMS_HEAD),
        decoder("llama-eager", "Llama", {**GROUPED, **eager}, GATED, RMS_HEAD),
        decoder("llama-padded", "Llama", GROUPED, GATED, RMS_HEAD, padded=True),
        decoder("llama-tied", "Llama", {**GROUPED, "tie_word_embeddings": True}, GATED, RMS_HEAD),
        decoder("mistral", "Mistral", {**GROUPED, "sliding_window": 4}, GATED, RMS_HEAD),
        decoder("qwen2", "Qwen2", GROUPED, GATED, RMS_HEAD),
        decoder("qwen3", "Qwen3", WIDE, qk_norm, RMS_HEAD),
        decoder("gemma", "Gemma", WIDE, GATED, RMS_HEAD),
        decoder("gemma2", "Gemma2", {**WIDE, **sliding, "query_pre_attn_scalar": 8}, four_norms, RMS_HEAD),
        decoder(
            "gemma2-eager",
            "Gemma2",
            {**WIDE, **sliding, **eager, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
            four_norms,
            RMS_HEAD,
        ),
        decoder(
            "gemma3",
            "Gemma3",
            {**WIDE, **sliding, "query_pre_attn_scalar": 8},
            gemma3,
            RMS_HEAD,
            config_class="Gemma3TextConfig",
        ),
        decoder("olmo2", "Olmo2", GROUPED, qk_norm, RMS_HEAD),
        decoder("granite", "Granite", {**GROUPED, "residual_multiplier": 0.5}, GATED, RMS_HEAD),
        decoder("smollm3", "SmolLM3", {**GROUPED, "no_rope_layers": [1, 1]}, GATED, RMS_HEAD),
        decoder("phi3", "Phi3", GROUPED, {**GATED, "linear": 4}, RMS_HEAD),
        decoder("glm", "Glm", {**WIDE, "attention_bias": True}, {**GATED, "linear": 6}, RMS_HEAD),
        decoder("glm4", "Glm4", WIDE, {**GATED, "linear": 6, "rms_norm": 4}, RMS_HEAD),
        decoder("helium", "Helium", WIDE, GATED, RMS_HEAD),
        decoder(
            "exaone4", "Exaone4", {**WIDE, **sliding}, {**qk_norm, "rope": 0}, RMS_HEAD, extra={"rope": 2}
        ),
        decoder("seed-oss", "SeedOss", WIDE, GATED, RMS_HEAD),
        decoder("ernie4.5", "Ernie4_5", WIDE, GATED, RMS_HEAD),
        decoder(
            "apertus",
            "Apertus",
            {**GROUPED, "max_position_embeddings": 65536},
            {**qk_norm, "linear": 6, "gated_mlp": 0},
            RMS_HEAD,
        ),
    ]


def layer_norm_like() -> list[ZooEntry]:
    """Layer norm, with or without rotary embedding."""
    rotary = {**PLAIN, "rope": 2}
    gated = {"attention": 1, "linear": 7, "layer_norm": 2, "rope": 2, "gated_mlp": 1}
    parallel = {**gated, "layer_norm": 1}
    eager = {"attn_implementation": "eager"}
    gpt = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": MLP}
    gpt = {**gpt, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    two_tables = {"linear": 1, "layer_norm": 1, "embedding": 2}
    alibi = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}
    mpt = {"vocab_size": VOCAB, "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 32}
    fused = {"attention": 1, "linear": 4, "layer_norm": 2}
    opt = {**BASE, "ffn_dim": MLP, "word_embed_proj_dim": HIDDEN}
    falcon = {**BASE, "num_kv_heads": KV_HEADS, "new_decoder_architecture": True, "bias": False}
    partial = {**GROUPED, "partial_rotary_factor": 0.5}
    return [
        decoder("gpt2", "GPT2", gpt, fused, two_tables, model_class="GPT2LMHeadModel"),
        decoder("gpt2-eager", "GPT2", {**gpt, **eager}, fused, two_tables, model_class="GPT2LMHeadModel"),
        decoder("gpt-bigcode", "GPTBigCode", {**gpt, "multi_query": True}, fused, two_tables),
        decoder("gptj", "GPTJ", {**gpt, "rotary_dim": 4}, {**rotary, "layer_norm": 1}, LAYER_NORM_HEAD),
        decoder(
            "codegen",
            "CodeGen",
            {**gpt, "n_head": 4, "rotary_dim": 4},
            {**rotary, "linear": 4, "layer_norm": 1},
            LAYER_NORM_HEAD,
        ),
        decoder("gpt-neox", "GPTNeoX", {**BASE, "rotary_pct": 0.5}, {**fused, "rope": 2}, LAYER_NORM_HEAD),
        decoder(
            "gpt-neo",
            "GPTNeo",
            {
                **BASE,
                "num_layers": LAYERS,
                "num_heads": HEADS,
                "window_size": 4,
                "attention_types": [[["global", "local"], 1]],
            },
            PLAIN,
            two_tables,
        ),
        decoder("opt", "OPT", opt, PLAIN, two_tables),
        decoder("bloom", "Bloom", alibi, fused, {**LAYER_NORM_HEAD, "layer_norm": 2}),
        decoder("mpt", "Mpt", mpt, fused, LAYER_NORM_HEAD),
        decoder("falcon", "Falcon", falcon, {**fused, "rope": 2}, LAYER_NORM_HEAD),
        decoder("phi", "Phi", partial, {**rotary, "layer_norm": 1}, LAYER_NORM_HEAD),
        decoder("stablelm", "StableLm", partial, gated, LAYER_NORM_HEAD),
        decoder("starcoder2", "Starcoder2", GROUPED, rotary, LAYER_NORM_HEAD),
        decoder("cohere", "Cohere", GROUPED, parallel, LAYER_NORM_HEAD),
        decoder("cohere2", "Cohere2", {**WIDE, "sliding_window": 4}, parallel, LAYER_NORM_HEAD),
        decoder("olmo", "Olmo", GROUPED, gated, LAYER_NORM_HEAD),
        decoder("nemotron", "Nemotron", {**WIDE, "partial_rotary_factor": 0.5}, rotary, LAYER_NORM_HEAD),
        decoder(
            "persimmon",
            "Persimmon",
            {**BASE, "partial_rotary_factor": 0.5},
            {**fused, "rope": 2, "layer_norm": 4},
            LAYER_NORM_HEAD,
        ),
        decoder(
            "xglm",
            "XGLM",
            {
                "vocab_size": VOCAB,
                "d_model": HIDDEN,
                "ffn_dim": MLP,
                "num_layers": LAYERS,
                "attention_heads": HEADS,
                "max_position_embeddings": 32,
            },
            PLAIN,
            {"linear": 1, "layer_norm": 1, "embedding": 1},
        ),
        decoder("biogpt", "BioGpt", BASE, PLAIN, two_tables),
    ]


def mixtures() -> list[ZooEntry]:
    """Mixtures of experts: the router is a linear layer, the experts' matmuls are batched and not counted.

    Experts compute their gated activation on all chosen (token, expert) pairs at once: one gated_mlp a layer,
    except gpt-oss, whose clamped `(up + 1) * gate * sigmoid(1.702 gate)` is another function.
    """
    moe = {"attention": 1, "linear": 5, "rms_norm": 2, "rope": 2, "gated_mlp": 1}
    qk_norm = {**moe, "rms_norm": 4}
    shared = {**moe, "linear": 9, "gated_mlp": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    local = {"num_local_experts": 4, "num_experts_per_tok": 2}
    gpt_oss = {**WIDE, **local, "sliding_window": 4, "max_position_embeddings": 131072}
    latent = {
        **BASE,
        "num_key_value_heads": HEADS,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 40,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    }
    latent_block = {"attention": 1, "linear": 5 + 3, "rms_norm": 4, "rope": 2, "gated_mlp": 1}
    latent_experts = {"linear": 1, "gated_mlp": 1}
    return [
        decoder("mixtral", "Mixtral", {**GROUPED, **local}, moe, RMS_HEAD),
        decoder(
            "qwen2-moe",
            "Qwen2Moe",
            {**GROUPED, **experts, "shared_expert_intermediate_size": 56},
            shared,
            RMS_HEAD,
        ),
        decoder("qwen3-moe", "Qwen3Moe", {**WIDE, **experts}, qk_norm, RMS_HEAD),
        decoder("olmoe", "Olmoe", {**GROUPED, **experts}, qk_norm, RMS_HEAD),
        decoder("granite-moe", "GraniteMoe", {**GROUPED, **local}, moe, RMS_HEAD),
        decoder("gpt-oss", "GptOss", gpt_oss, {**moe, "gated_mlp": 0}, RMS_HEAD),
        decoder("deepseek-v2", "DeepseekV2", latent, latent_block, RMS_HEAD, extra=latent_experts),
        decoder("deepseek-v3", "DeepseekV3", latent, latent_block, RMS_HEAD, extra=latent_experts),
    ]


def entries() -> list[ZooEntry]:
    """Every causal language model."""
    return [*llama_like(), *layer_norm_like(), *mixtures()]
