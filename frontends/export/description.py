"""What of a language model `generate()` needs beside its programs: JSON files and the tokenizer's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tilewright.compiler.diagnostics import LoadError
from tilewright.frontends.export.artifact import Artifact
from tilewright.frontends.loaded_model import LoadedModel
from tilewright.frontends.model_files import read_json_object

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
"""As Hugging Face folders name them."""
_OF_A_PLACE = ("_name_or_path", "name_or_path")
"""Entries that tell where the model lay."""


def write_description(artifact: Artifact, loaded: LoadedModel) -> None:
    """Configuration, generation defaults and tokenizer of a Hugging Face model; nothing for another one."""
    from transformers import PreTrainedConfig

    from tilewright.frontends.hugging_face import trusted

    config = getattr(loaded.module, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return
    described = trusted(json.loads(config.to_json_string(use_diff=False)))
    _write_json(artifact, CONFIG, described)
    defaults: Any = getattr(loaded.module, "generation_config", None)
    if defaults is not None:
        _write_json(artifact, GENERATION_CONFIG, json.loads(defaults.to_json_string()))
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(artifact.folder)


def _write_json(artifact: Artifact, name: str, described: dict[str, Any]) -> None:
    kept = {key: value for key, value in described.items() if key not in _OF_A_PLACE}
    artifact.write(name, json.dumps(kept, indent=2, sort_keys=True) + "\n")


def read_description(folder: Path, files: dict[str, Any]) -> tuple[Any, Any]:
    """(configuration, generation defaults) of an artifact whose `files` were checked. LoadError without a
    configuration, or for one that transformers does not know."""
    from transformers import GenerationConfig

    from tilewright.frontends.hugging_face import described_config, reading

    if CONFIG not in files:
        raise LoadError(
            f"has no {CONFIG}",
            where=str(folder),
            remedy="export a Hugging Face language model again, with --format pt2 --capacity TOKENS",
        )
    config = described_config(read_json_object(folder / CONFIG), folder / CONFIG)
    if GENERATION_CONFIG not in files:
        return config, GenerationConfig()
    with reading(folder / GENERATION_CONFIG):
        return config, GenerationConfig.from_dict(read_json_object(folder / GENERATION_CONFIG))
