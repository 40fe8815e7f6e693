"""Diffusion transformers of the zoo: tiny canvases, every axis of another length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tilewright.tools.zoo_entry import Inputs, ZooEntry, counts, noise, seeded_model

BATCH, HEADS, HEAD_DIM = 2, 3, 16
WIDTH = HEADS * HEAD_DIM
TEXT, TEXT_DIM, POOLED = 7, 40, 24
LAYERS = 2
NO_DICT = {"return_dict": False}


def _from_settings(model_class: str, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        return seeded_model(lambda: getattr(diffusers, model_class)(**settings))

    return build


def _text() -> torch.Tensor:
    return noise(BATCH, TEXT, TEXT_DIM, seed=4)


def _text_mask() -> torch.Tensor:
    return (torch.arange(TEXT) < torch.tensor([TEXT, TEXT - 2])[:, None]).long()


def _steps() -> torch.Tensor:
    return torch.tensor([300, 700])


def _diffusion(
    name: str,
    model_class: str,
    settings: Mapping[str, Any],
    inputs: Callable[[], Inputs],
    expected: dict[str, int],
    layers: int = LAYERS,
    gathers: bool = False,
) -> ZooEntry:
    heads = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "num_layers": LAYERS}
    return ZooEntry(
        name=name,
        family="diffusion",
        build=_from_settings(model_class, {**heads, **settings}),
        inputs=inputs,
        expected=expected,
        layers=layers,
        gathers=gathers,
    )


def _wan() -> ZooEntry:
    def inputs() -> Inputs:
        return (noise(BATCH, 4, 3, 8, 10), _steps(), _text()), NO_DICT

    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 80,
        "rope_max_seq_len": 32,
    }
    # Self and cross attention (q k v o each, q and k normalised over all heads), two linears of the MLP,
    # three norms.
    block = {"attention": 2, "linear": 10, "rms_norm": 4, "layer_norm": 3, "rope": 2}
    # Time: two linears and the projection to six modulations; text: two; output: one with its norm.
    ends = {"linear": 6, "layer_norm": 1}
    return _diffusion("wan", "WanTransformer3DModel", settings, inputs, counts((LAYERS, block), (1, ends)))


def _hunyuan() -> ZooEntry:
    def inputs() -> Inputs:
        args = (noise(BATCH, 4, 3, 8, 10), _steps(), _text(), _text_mask(), noise(BATCH, POOLED, seed=5))
        return args, {"guidance": torch.tensor([1000.0, 6000.0]), **NO_DICT}

    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": LAYERS,
        "num_single_layers": LAYERS,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM,
        "pooled_projection_dim": POOLED,
        "rope_axes_dim": (4, 6, 6),
    }
    # Two streams, each: q k v o, the two linears of an MLP, a modulation, two norms, q and k norms.
    double = {"attention": 1, "linear": 14, "rms_norm": 4, "layer_norm": 4, "rope": 2}
    # One stream: q k v, MLP in, joint out, modulation.
    single = {"attention": 1, "linear": 6, "rms_norm": 2, "layer_norm": 1, "rope": 2}
    refiner = {"attention": 1, "linear": 7, "layer_norm": 2}
    # Time, guidance and pooled text (two linears each), the refiner's own time and text embedding (two each)
    # and input projection, final modulation and output.
    ends = {"linear": 6 + 4 + 1 + 2, "layer_norm": 1}
    expected = counts((LAYERS, double), (LAYERS, single), (1, refiner), (1, ends))
    return _diffusion("hunyuan-video", "HunyuanVideoTransformer3DModel", settings, inputs, expected, layers=4)


def _cogvideox() -> ZooEntry:
    def inputs() -> Inputs:
        tokens = 3 * 4 * 5
        rotary = (noise(tokens, HEAD_DIM, seed=6), noise(tokens, HEAD_DIM, seed=7))
        args = (noise(BATCH, 3, 4, 8, 10), _text(), _steps())
        return args, {"image_rotary_emb": rotary, **NO_DICT}

    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 32,
        "text_embed_dim": TEXT_DIM,
        "sample_width": 10,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": TEXT,
        "use_rotary_positional_embeddings": True,
    }
    # q k v o, MLP, two modulations; before each half one norm on video and text, and norms of q and k.
    block = {"attention": 1, "linear": 8, "layer_norm": 6, "rope": 2}
    # Time: two linears; text: one; last norm, modulating norm with its linear, output.
    ends = {"linear": 5, "layer_norm": 2}
    return _diffusion(
        "cogvideox", "CogVideoXTransformer3DModel", settings, inputs, counts((LAYERS, block), (1, ends))
    )


def _ltx() -> ZooEntry:
    def inputs() -> Inputs:
        kwargs = {"encoder_attention_mask": _text_mask(), "num_frames": 3, "height": 4, "width": 5, **NO_DICT}
        return (noise(BATCH, 60, 8), _text(), _steps()), kwargs

    settings = {
        "in_channels": 8,
        "out_channels": 8,
        "cross_attention_dim": WIDTH,
        "caption_channels": TEXT_DIM,
    }
    # Self and cross attention with q and k norms, two norms without weights, MLP.
    block = {"attention": 2, "linear": 10, "rms_norm": 6, "rope": 2}
    # Input, time (two and the projection to six), caption (two), output with its norm.
    ends = {"linear": 7, "layer_norm": 1}
    return _diffusion(
        "ltx", "LTXVideoTransformer3DModel", settings, inputs, counts((LAYERS, block), (1, ends))
    )


def _mochi() -> ZooEntry:
    def inputs() -> Inputs:
        return (noise(BATCH, 4, 3, 8, 10), _text(), _steps(), _text_mask()), NO_DICT

    settings = {
        "in_channels": 4,
        "pooled_projection_dim": POOLED,
        "text_embed_dim": TEXT_DIM,
        "time_embed_dim": 32,
        "max_sequence_length": TEXT,
    }
    # Two streams: q k v o, SwiGLU (gate and up in one linear), modulation, four norms, q and k norms.
    # Attention runs sample by sample over the valid text tokens: one for us.
    block = {"attention": 1, "linear": 14, "rms_norm": 12, "rope": 2, "gated_mlp": 2}
    # The last block's text stream gives keys and values only.
    short = {"linear": -3, "rms_norm": -3, "gated_mlp": -1}
    # Time (two), attention pooling of the text (three), text, output with its modulation and norm.
    ends = {"attention": 1, "linear": 8, "layer_norm": 1}
    expected = counts((LAYERS, block), (1, short), (1, ends))
    return _diffusion("mochi", "MochiTransformer3DModel", settings, inputs, expected, gathers=True)


def _pixart() -> ZooEntry:
    def inputs() -> Inputs:
        kwargs = {
            "encoder_hidden_states": _text(),
            "timestep": _steps(),
            "encoder_attention_mask": _text_mask(),
        }
        conditions = {"resolution": None, "aspect_ratio": None}
        return (noise(BATCH, 4, 8, 8),), {**kwargs, "added_cond_kwargs": conditions, **NO_DICT}

    settings = {
        "in_channels": 4,
        "out_channels": 8,
        "cross_attention_dim": WIDTH,
        "sample_size": 8,
        "caption_channels": TEXT_DIM,
        "use_additional_conditions": False,
        "norm_num_groups": 1,
    }
    block = {"attention": 2, "linear": 10, "layer_norm": 2}
    # Time (two and the projection to six), caption (two), output with its norm.
    ends = {"linear": 6, "layer_norm": 1}
    return _diffusion(
        "pixart", "PixArtTransformer2DModel", settings, inputs, counts((LAYERS, block), (1, ends))
    )


def _sd3() -> ZooEntry:
    def inputs() -> Inputs:
        args = (noise(BATCH, 4, 8, 10), _text(), noise(BATCH, POOLED, seed=5), _steps())
        return args, NO_DICT

    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 10,
        "joint_attention_dim": TEXT_DIM,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": 6,
        "qk_norm": "rms_norm",
    }
    # Two streams: q k v o, MLP, modulation, two norms, q and k norms.
    block = {"attention": 1, "linear": 14, "rms_norm": 4, "layer_norm": 4}
    # The last block's text stream gives keys and values only: no output, no MLP (2), one norm less.
    short = {"linear": -3, "layer_norm": -1}
    # Time and pooled text (two each), text, output with its modulation and norm.
    ends = {"linear": 7, "layer_norm": 1}
    return _diffusion(
        "sd3", "SD3Transformer2DModel", settings, inputs, counts((LAYERS, block), (1, short), (1, ends))
    )


def _flux() -> ZooEntry:
    def inputs() -> Inputs:
        rows = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(5)).float()
        kwargs = {"img_ids": rows, "txt_ids": torch.zeros(TEXT, 3), "guidance": torch.tensor([3.5, 5.0])}
        args = (noise(BATCH, 20, 8), _text(), noise(BATCH, POOLED, seed=5), torch.tensor([0.3, 0.7]))
        return args, {**kwargs, **NO_DICT}

    settings = {
        "in_channels": 8,
        "num_layers": LAYERS,
        "num_single_layers": LAYERS,
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    double = {"attention": 1, "linear": 14, "rms_norm": 4, "layer_norm": 4, "rope": 2}
    single = {"attention": 1, "linear": 6, "rms_norm": 2, "layer_norm": 1, "rope": 2}
    # Image and text inputs, time, guidance and pooled text (two each), output with its modulation and norm.
    ends = {"linear": 10, "layer_norm": 1}
    expected = counts((LAYERS, double), (LAYERS, single), (1, ends))
    return _diffusion("flux", "FluxTransformer2DModel", settings, inputs, expected, layers=4)


def entries() -> list[ZooEntry]:
    """Every diffusion transformer."""
    return [_wan(), _hunyuan(), _cogvideox(), _ltx(), _mochi(), _pixart(), _sd3(), _flux()]
