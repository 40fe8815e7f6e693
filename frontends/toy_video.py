"""The bundled video transformer that was trained: two shapes that move, named by six words.

`tools/train_toy_video.py` made its weights. Latents are the pixels themselves, float32 [B, 3, 4, 32, 32] in
-1..1; a patch is 1 x 2 x 2, so the tokens are a grid of 4 x 16 x 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.compiler.diagnostics import LoadError, OptionError, nearest

KINDS = ("disc", "square", "diamond")
COLOURS = ("red", "green", "blue", "white")
DIRECTIONS = ("still", "left", "right", "up", "down")
WORDS = ("", *KINDS, *COLOURS, *DIRECTIONS)
"""The first is what guidance calls no prompt."""
PROMPT_WORDS = 6
TEXT_DIM = 32
SHAPE = (3, 4, 32, 32)
"""Of one latent: channels, frames, height, width."""
PEAK = 2.0
"""Range of the latents, for the peak signal-to-noise ratio."""
WEIGHTS = Path(__file__).parent / "toy_video_dit.safetensors"
PROMPTS = (
    "red disc right blue square left",
    "white diamond up green disc down",
    "green square still red diamond left",
    "blue disc down white square right",
)


def untrained() -> nn.Module:
    """The architecture with the weights that the caller's random state gives."""
    from diffusers import WanTransformer3DModel

    module: nn.Module = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=SHAPE[0],
        out_channels=SHAPE[0],
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        rope_max_seq_len=32,
    )
    return module


def trained() -> nn.Module:
    """The model with its shipped weights, float32; LoadError where they are not of this architecture."""
    from safetensors.torch import load_file

    from tilewright.frontends.safetensors_check import check_safetensors

    check_safetensors(WEIGHTS)
    module = untrained()
    given = {name: value.float() for name, value in load_file(WEIGHTS).items()}
    wanted = {name: value.shape for name, value in module.state_dict().items()}
    if {name: value.shape for name, value in given.items()} != wanted:
        raise LoadError("does not hold the weights of toy-video-dit", where=str(WEIGHTS))
    module.load_state_dict(given)
    return module.eval()


def embed(words: Sequence[str]) -> Tensor:
    """A prompt of six words (kind, colour, direction in any order) as float32 [1, 6, 32]; none: all empty."""
    if len(words) not in (0, PROMPT_WORDS):
        raise OptionError(f"the prompt has {len(words)} words, expected {PROMPT_WORDS}, or none")
    for word in words:
        if word not in WORDS:
            raise OptionError(f"the prompt's word {word!r} is not known", remedy=nearest(word, WORDS))
    table = torch.randn(len(WORDS), TEXT_DIM, generator=torch.Generator().manual_seed(77))
    places = torch.randn(PROMPT_WORDS, TEXT_DIM, generator=torch.Generator().manual_seed(78))
    ids = [WORDS.index(word) for word in words] or [0] * PROMPT_WORDS
    return (table[ids] + places)[None]


def examples() -> dict[str, Any]:
    """`denoise`: one call at the middle of a request. Frames other than 4 were not trained."""

    def denoise(length: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        channels, frames, height, width = SHAPE
        generator = torch.Generator().manual_seed(2)
        latents = torch.randn(1, channels, length or frames, height, width, generator=generator)
        text = embed(PROMPTS[0].split())
        named = {"hidden_states": latents, "timestep": torch.tensor([500.0]), "encoder_hidden_states": text}
        return (), {**named, "return_dict": False}

    return {"denoise": denoise}
