"""Vision models of the zoo, and the image-text pairs CLIP and SigLIP."""

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
CHANNELS, IMAGE, PATCH = 3, 20, 5
"""A 20 x 20 image in 16 patches."""
PAIRS = 4
"""Images and texts of the image-text models."""

BASE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "num_channels": CHANNELS,
}
BLOCK = {"attention": 1, "linear": 6, "layer_norm": 2}
"""A ViT block: q k v o, two linears of the MLP, two norms."""


def image_inputs() -> Inputs:
    """Pixels [5, 3, 20, 20]."""
    return (noise(BATCH, CHANNELS, IMAGE, IMAGE),), {"return_dict": False}


def swin_inputs() -> Inputs:
    """Pixels [5, 3, 24, 24]: windows of 3 divide the 12 x 12 and 6 x 6 patches of both stages."""
    return (noise(BATCH, CHANNELS, 24, 24),), {"return_dict": False}


def pair_inputs() -> Inputs:
    """Padded token ids [4, 7] and pixels [4, 3, 20, 20]."""
    kwargs = {"pixel_values": noise(PAIRS, CHANNELS, IMAGE, IMAGE), "attention_mask": right_padding(PAIRS)}
    return (tokens(PAIRS, SEQ),), {**kwargs, "return_dict": False}


def vision(
    name: str,
    kind: str,
    settings: Mapping[str, Any],
    *parts: tuple[int, Mapping[str, int]],
    model: str = "",
    layers: int = LAYERS,
) -> ZooEntry:
    """An entry `{kind}Model` (or the class named) on images."""
    return ZooEntry(
        name=name,
        family="vision",
        build=from_config(model or f"{kind}Model", f"{kind}Config", settings),
        inputs=swin_inputs if kind in ("Swin", "Swinv2", "ConvNext", "ConvNextV2") else image_inputs,
        expected=counts(*parts),
        layers=layers,
    )


def pair(name: str, kind: str, text: Mapping[str, Any], head: Mapping[str, int]) -> ZooEntry:
    """An image-text entry: two encoders of `LAYERS` blocks and a head."""
    settings = {"text_config": dict(text), "vision_config": BASE, "projection_dim": 40}
    return ZooEntry(
        name=name,
        family="vision",
        build=from_config(f"{kind}Model", f"{kind}Config", settings),
        inputs=pair_inputs,
        expected=counts((2 * LAYERS, BLOCK), (1, head)),
        layers=2 * LAYERS,
    )


def transformers_of_patches() -> list[ZooEntry]:
    """ViT and its relatives: patches by a convolution, then encoder blocks."""
    last = {"layer_norm": 1}
    pooled = {"layer_norm": 1, "linear": 1}
    beit = {**BASE, "use_mean_pooling": True, "layer_scale_init_value": 0.1, "vocab_size": VOCAB}
    biased = {**beit, "use_relative_position_bias": True}
    swiglu = {**BASE, "use_swiglu_ffn": True}
    return [
        vision("vit", "ViT", BASE, (LAYERS, BLOCK), (1, pooled)),
        vision("vit-eager", "ViT", {**BASE, "attn_implementation": "eager"}, (LAYERS, BLOCK), (1, pooled)),
        vision(
            "vit-classifier", "ViT", BASE, (LAYERS, BLOCK), (1, pooled), model="ViTForImageClassification"
        ),
        vision("deit", "DeiT", BASE, (LAYERS, BLOCK), (1, pooled)),
        vision("dinov2", "Dinov2", BASE, (LAYERS, BLOCK), (1, last)),
        vision(
            "dinov2-swiglu", "Dinov2", swiglu, (LAYERS, {**BLOCK, "linear": 7, "gated_mlp": 1}), (1, last)
        ),
        vision("dinov3", "DINOv3ViT", BASE, (LAYERS, {**BLOCK, "rope": 2}), (1, last)),
        vision("beit", "Beit", beit, (LAYERS, BLOCK), (1, last)),
        vision("beit-relative", "Beit", biased, (LAYERS, BLOCK), (1, last)),
        vision("data2vec-vision", "Data2VecVision", beit, (LAYERS, BLOCK)),
        vision("ijepa", "IJepa", BASE, (LAYERS, BLOCK), (1, last)),
        vision("vit-msn", "ViTMSN", BASE, (LAYERS, BLOCK), (1, last)),
    ]


def hierarchies() -> list[ZooEntry]:
    """Stages of shrinking grids: windowed attention and convolutions."""
    swin = {
        "image_size": 24,
        "patch_size": 2,
        "num_channels": CHANNELS,
        "embed_dim": 24,
        "depths": [2, 1],
        "num_heads": [3, 6],
        "window_size": 3,
        "mlp_ratio": 2.0,
    }
    convnext = {
        "num_channels": CHANNELS,
        "patch_size": 2,
        "num_stages": 2,
        "hidden_sizes": [24, 40],
        "depths": [2, 1],
        "layer_scale_init_value": 0.1,
    }
    blocks = 3
    # One norm after the patches, one at the end, one norm and one linear between the stages.
    swin_ends = {"layer_norm": 3, "linear": 1}
    # Swin v2 norms after the block's two halves and computes its bias by a two-layer network per block.
    swin2 = {**BLOCK, "linear": 8}
    convnext_block = {"linear": 2, "layer_norm": 1}
    # The stem, the norm between the stages (both over channels first) and the last one.
    convnext_ends = {"layer_norm": 3}
    return [
        vision("swin", "Swin", swin, (blocks, BLOCK), (1, swin_ends), layers=blocks),
        vision("swinv2", "Swinv2", swin, (blocks, swin2), (1, swin_ends), layers=blocks),
        vision("convnext", "ConvNext", convnext, (blocks, convnext_block), (1, convnext_ends), layers=blocks),
        vision(
            "convnextv2",
            "ConvNextV2",
            {**convnext},
            (blocks, convnext_block),
            (1, convnext_ends),
            layers=blocks,
        ),
    ]


def pairs() -> list[ZooEntry]:
    """Image-text models."""
    text = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": MLP,
        "max_position_embeddings": 16,
        "projection_size": HIDDEN,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    # Words, positions and patch positions; pre and post norm of the image half, last norm of the text half;
    # two projections.
    clip = {"embedding": 3, "layer_norm": 3, "linear": 2}
    # The image half ends in attention pooling: q, k and v in one, o, and an MLP; the text half in one linear.
    siglip = {"embedding": 3, "layer_norm": 3, "attention": 1, "linear": 6}
    return [pair("clip", "CLIP", text, clip), pair("siglip", "Siglip", text, siglip)]


def entries() -> list[ZooEntry]:
    """Every vision model."""
    return [*transformers_of_patches(), *hierarchies(), *pairs()]
