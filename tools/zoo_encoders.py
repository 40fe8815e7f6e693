"""Text encoders and encoder-decoders of the zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tilewright.tools.zoo_entry import (
    BATCH,
    HEADS,
    HIDDEN,
    MLP,
    SEQ,
    VOCAB,
    Inputs,
    ZooEntry,
    counts,
    from_config,
    noise,
    right_padding,
    tokens,
)

LAYERS = 2
TARGET = 4
"""Decoder tokens of the encoder-decoders."""

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
BLOCK = {"attention": 1, "linear": 6, "layer_norm": 2}
"""A BERT block: q k v o, two linears of the MLP, two norms."""
EMBEDDINGS = {"embedding": 3, "layer_norm": 1}
"""Words, positions, token types, and the norm over their sum."""
POOLER = {"linear": 1}


def padded_inputs() -> Inputs:
    """Token ids [5, 7] with right padding: a boolean or additive mask reaches every attention."""
    return (tokens(BATCH, SEQ),), {"attention_mask": right_padding(), "return_dict": False}


def encoder(
    name: str,
    kind: str,
    settings: Mapping[str, Any],
    *parts: tuple[int, Mapping[str, int]],
) -> ZooEntry:
    """An entry `{kind}Model` whose expected ops are the sum of `parts`."""
    return ZooEntry(
        name=name,
        family="encoder",
        build=from_config(f"{kind}Model", f"{kind}Config", settings),
        inputs=padded_inputs,
        expected=counts(*parts),
        layers=LAYERS,
    )


def encoders() -> list[ZooEntry]:
    """BERT and its relatives, with a padded batch."""
    bert = ((LAYERS, BLOCK), (1, EMBEDDINGS), (1, POOLER))
    eager = {"attn_implementation": "eager"}
    distil = {
        "vocab_size": VOCAB,
        "dim": HIDDEN,
        "hidden_dim": MLP,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    deberta = {
        **BASE,
        "relative_attention": True,
        "position_buckets": 4,
        "max_relative_positions": 32,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
    }
    modern = {
        **BASE,
        "local_attention": 4,
        "global_attn_every_n_layers": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "attn_implementation": "sdpa",
    }
    modern_block = {"attention": 1, "linear": 4, "layer_norm": 2, "rope": 2, "gated_mlp": 1}
    mpnet_bias = {"embedding": 1}
    return [
        encoder("bert", "Bert", BASE, *bert),
        encoder("bert-eager", "Bert", {**BASE, **eager}, *bert),
        encoder("roberta", "Roberta", BASE, *bert),
        encoder("xlm-roberta", "XLMRoberta", BASE, *bert),
        encoder("distilbert", "DistilBert", distil, (LAYERS, BLOCK), (1, {"embedding": 2, "layer_norm": 1})),
        encoder(
            "electra",
            "Electra",
            {**BASE, "embedding_size": 32},
            (LAYERS, BLOCK),
            (1, EMBEDDINGS),
            (1, {"linear": 1}),
        ),
        encoder(
            "albert",
            "Albert",
            {**BASE, "embedding_size": 32},
            (LAYERS, BLOCK),
            (1, EMBEDDINGS),
            (1, {"linear": 1}),
            (1, POOLER),
        ),
        encoder("camembert", "Camembert", BASE, *bert),
        encoder("ernie", "Ernie", BASE, (LAYERS, BLOCK), (1, {**EMBEDDINGS, "embedding": 3}), (1, POOLER)),
        # The bias is one table shared by all layers.
        encoder(
            "mpnet",
            "MPNet",
            BASE,
            (LAYERS, BLOCK),
            (1, {"embedding": 2, "layer_norm": 1}),
            (1, mpnet_bias),
            (1, POOLER),
        ),
        # q and k projections are applied to the relative table as well; one norm on that table.
        encoder(
            "deberta-v2",
            "DebertaV2",
            deberta,
            (LAYERS, {**BLOCK, "linear": 8}),
            (1, {"embedding": 1, "layer_norm": 1}),
            (1, {"layer_norm": 1}),
        ),
        # The first block has no norm before its attention; one norm after the embedding, one at the end.
        encoder(
            "modernbert", "ModernBert", modern, (LAYERS, modern_block), (1, {"embedding": 1, "layer_norm": 1})
        ),
        encoder(
            "esm",
            "Esm",
            {**BASE, "position_embedding_type": "rotary", "mask_token_id": 3},
            (LAYERS, {**BLOCK, "rope": 2}),
            (1, {"embedding": 1, "layer_norm": 1}),
            (1, POOLER),
        ),
    ]


def seq2seq_inputs() -> Inputs:
    """Padded source [5, 7], target [5, 4]."""
    kwargs = {"decoder_input_ids": tokens(BATCH, TARGET, seed=3), "attention_mask": right_padding()}
    return (tokens(BATCH, SEQ),), {**kwargs, "use_cache": False, "return_dict": False}


def speech_inputs() -> Inputs:
    """Log-mel features [5, 10, 22], target [5, 4]."""
    kwargs = {"decoder_input_ids": tokens(BATCH, TARGET, seed=3), "use_cache": False, "return_dict": False}
    return (noise(BATCH, 10, 22),), kwargs


def encoder_decoders() -> list[ZooEntry]:
    """T5 and BART families and Whisper: self-attention in both halves, cross-attention in the decoder."""
    t5 = {
        "vocab_size": VOCAB,
        "d_model": HIDDEN,
        "d_kv": 8,
        "d_ff": MLP,
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "num_heads": HEADS,
        "relative_attention_num_buckets": 8,
        "decoder_start_token_id": 0,
        "use_cache": False,
    }
    bart = {
        "vocab_size": VOCAB,
        "d_model": HIDDEN,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": MLP,
        "decoder_ffn_dim": MLP,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "use_cache": False,
    }
    whisper = {**bart, "num_mel_bins": 10, "max_source_positions": 11, "max_target_positions": 32}
    encode, decode = BLOCK, {"attention": 2, "linear": 10, "layer_norm": 3}
    t5_encode = {"attention": 1, "linear": 6, "rms_norm": 2}
    t5_decode = {"attention": 2, "linear": 10, "rms_norm": 3}
    # Two token tables' look-ups, two relative-bias tables, two final norms, the head.
    t5_ends = {"embedding": 4, "rms_norm": 2, "linear": 1}
    gated = (LAYERS, {"linear": 2, "gated_mlp": 2})
    bart_ends = {"embedding": 4, "layer_norm": 2, "linear": 1}
    sinusoidal = {"embedding": 4, "layer_norm": 2, "linear": 1}
    halves = ((LAYERS, encode), (LAYERS, decode))
    t5_halves = ((LAYERS, t5_encode), (LAYERS, t5_decode), (1, t5_ends))
    return [
        seq2seq("t5", "T5", t5, *t5_halves),
        seq2seq("t5-gated", "T5", {**t5, "feed_forward_proj": "gated-gelu"}, *t5_halves, gated),
        seq2seq(
            "umt5",
            "UMT5",
            {**t5, "feed_forward_proj": "gated-gelu"},
            *t5_halves,
            gated,
            (1, {"embedding": 2 * (LAYERS - 1)}),
        ),
        seq2seq("bart", "Bart", bart, *halves, (1, bart_ends)),
        seq2seq("mbart", "MBart", bart, *halves, (1, {**bart_ends, "layer_norm": 4})),
        seq2seq("pegasus", "Pegasus", bart, *halves, (1, sinusoidal)),
        seq2seq(
            "marian", "Marian", bart, *halves, (1, {**sinusoidal, "layer_norm": 0}), model="MarianMTModel"
        ),
        seq2seq(
            "whisper",
            "Whisper",
            whisper,
            *halves,
            (1, {"embedding": 2, "layer_norm": 2, "linear": 1}),
            speech=True,
        ),
    ]


def seq2seq(
    name: str,
    kind: str,
    settings: Mapping[str, Any],
    *parts: tuple[int, Mapping[str, int]],
    speech: bool = False,
    model: str = "",
) -> ZooEntry:
    """An entry `{kind}ForConditionalGeneration`."""
    return ZooEntry(
        name=name,
        family="encoder-decoder",
        build=from_config(model or f"{kind}ForConditionalGeneration", f"{kind}Config", settings),
        inputs=speech_inputs if speech else seq2seq_inputs,
        expected=counts(*parts),
        layers=2 * LAYERS,
    )


def entries() -> list[ZooEntry]:
    """Every text encoder and encoder-decoder."""
    return [*encoders(), *encoder_decoders()]
