"""Hugging Face folders and GGUF files: checked, sized without memory, then read by their own libraries."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import math
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewright.compiler.diagnostics import LoadError, TilewrightError
from tilewright.compiler.paging import page_out
from tilewright.frontends.example_calls import causal_lm_examples, encoder_examples, wan_examples
from tilewright.frontends.gguf_check import GgufInfo, check_gguf
from tilewright.frontends.loaded_model import LoadedModel
from tilewright.frontends.model_files import file_inside, model_file, open_model_file, read_json_object, show
from tilewright.frontends.quantized_folder import check_method, find_layers
from tilewright.frontends.safetensors_check import check_weights_folder
from tilewright.frontends.stored_linear import (
    Checkpoint,
    StoredLinear,
    fill,
    weight_count,
    without_weights,
)
from tilewright.frontends.weights import replace_weights
from tilewright.runtime.store import ArtifactStore

_log = logging.getLogger("tilewright.frontends")
_UNTRUSTED = (
    "auto_map",  # names Python files of the folder to run
    "attn_implementation",  # may name a kernel to download
    "_attn_implementation",
    "experts_implementation",
    "kernel_config",
    "fusion_config",
    "distributed_config",
    "transformers_weights",  # names another weight file
)
"""Entries of config.json that choose code or files; they are dropped, the rest describes the model."""
_COUNT = re.compile(r"^(num|n)_|layers?$|depth|blocks?$|_count$|experts")
_COUNT_CAP = 1 << 16
_NUMBER_CAP = 1 << 31
_BUFFER_CAP = 512 << 20
"""Bytes of tensors a model may compute for itself (position tables, masks)."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_folder(folder: Path, *, name: str | None = None) -> LoadedModel:
    """A model folder: config.json and safetensors weights, of transformers or diffusers. Raises LoadError."""
    config = read_json_object(file_inside(folder, "config.json"))
    weights = check_weights_folder(folder)
    headers = [header for file in weights.values() for header in file.values()]
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.is_symlink():
            file_inside(folder, path.name)
    if (folder / "generation_config.json").exists():
        read_json_object(folder / "generation_config.json")  # transformers would ignore a broken one
    elements = sum(math.prod(header.shape) for header in headers)
    _check_numbers(config, len(headers), str(folder / "config.json"))
    if "_class_name" in config:
        return _load_diffusers(folder, config, sorted(weights), elements, name or folder.name)
    with Checkpoint(folder, weights) as files:
        return _load_transformers(folder, config, elements, name or folder.name, files)


def load_gguf(path: Path, *, name: str | None = None) -> LoadedModel:
    """A GGUF file, dequantized to float32 once and then read from the artifact store. Raises LoadError."""
    key = {
        "artifact": "gguf-as-safetensors-1",
        "file": _file_sha256(model_file(path)),
        "dtype": "float32",
        "converter": _source_sha256(_dequantize, _convert),
        **{package: _version(package) for package in ("transformers", "gguf", "torch")},
    }
    folder = ArtifactStore.default().get_or_build(key, lambda target: _dequantize(path, target))
    return load_folder(folder, name=name or path.name)


def _load_transformers(
    folder: Path, raw: dict[str, Any], elements: int, name: str, files: Checkpoint
) -> LoadedModel:
    with reading(folder):
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
    where = str(folder / "config.json")
    quantized = check_method(raw, where)
    config = described_config(raw, folder / "config.json")
    with reading(folder / "config.json"):
        config_class = type(config)
        generates = config_class in MODEL_FOR_CAUSAL_LM_MAPPING and _wants_lm_head(raw)
        mapping = MODEL_FOR_CAUSAL_LM_MAPPING if generates else MODEL_MAPPING
        if config_class not in mapping:
            raise LoadError(f"model_type {config.model_type} has no model class to load", where=where)
        model_class = mapping[config_class]
        model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
    layers: list[StoredLinear] = []
    if quantized is None:
        _check_size(lambda: model_class(config), elements, where)
    else:
        empty = _without_memory(lambda: model_class(config), where)
        layers = find_layers(quantized, files, empty, where)
        _check_size(lambda: empty, elements + weight_count(layers), where)
    without: Any = without_weights(model_class, [layer.name for layer in layers]) if layers else model_class
    with reading(folder):
        module, found = without.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True,
            trust_remote_code=False, output_loading_info=True,
            attn_implementation="sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager",
        )  # fmt: skip
        tokenizer = tokenizer_in(folder)
    _check_complete(found, folder, {tensor for layer in layers for tensor in layer.tensors})
    module.__class__ = model_class
    _own_memory(module.eval())
    fill(module, layers, files)
    if generates:
        return LoadedModel(name, "causal-lm", module, tokenizer, causal_lm_examples(module))
    return LoadedModel(name, "module", module, tokenizer, encoder_examples(module))


def described_config(raw: Mapping[str, Any], path: Path) -> Any:
    """The configuration that a config.json at `path` describes, without entries that choose code or files."""
    with reading(path):
        from transformers import CONFIG_MAPPING
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise LoadError(f"model_type is {show(kind)}, which transformers does not know", where=str(path))
    with reading(path):
        return CONFIG_MAPPING[kind].from_dict(trusted(raw))


def trusted(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without entries that choose code or files, or say how quantized weights are stored."""
    return {k: v for k, v in raw.items() if k not in (*_UNTRUSTED, "quantization_config")}


def _wants_lm_head(raw: Mapping[str, Any]) -> bool:
    architectures = raw.get("architectures") or ()
    return not architectures or any("CausalLM" in str(a) or "LMHead" in str(a) for a in architectures)


def _load_diffusers(
    folder: Path, raw: dict[str, Any], files: list[Path], elements: int, name: str
) -> LoadedModel:
    with reading(folder):
        from diffusers import WanTransformer3DModel
    where = str(folder / "config.json")
    if raw["_class_name"] != "WanTransformer3DModel":
        remedy = "WanTransformer3DModel is the one that is read"
        raise LoadError(f"_class_name is {show(raw['_class_name'])}", where=where, remedy=remedy)
    described = {k: v for k, v in raw.items() if not k.startswith("_") and k not in _UNTRUSTED}
    _check_size(lambda: WanTransformer3DModel.from_config(described), elements, where)
    with reading(folder):
        module = WanTransformer3DModel.from_config(described).float()
    replace_weights(module, files)
    return LoadedModel(name, "dit", module.eval(), None, wan_examples(module))


def _own_memory(module: nn.Module) -> None:
    """Copy the weights out of the mapped file: aligned for kernels, and safe when the file is cut later."""
    for parameter in module.parameters():
        mapped = parameter.data
        parameter.data = mapped.clone()
        page_out(mapped)  # so that file and copy are never in memory at once


def tokenizer_in(folder: Path) -> Any | None:
    """The tokenizer whose files lie in a folder; None where there are none."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _dequantize(path: Path, target: Path) -> None:
    """Check a GGUF file, read it with transformers, save model and tokenizer as an ordinary folder."""
    info = check_gguf(path)
    _check_gguf_model(info, str(path))
    with tempfile.TemporaryDirectory() as folder:
        # Alone in a folder: transformers would also read configuration files that lie beside it.
        (Path(folder) / "model.gguf").symlink_to(path.absolute())
        with _parsed_once(path):
            _convert(path, Path(folder), info, target)


@contextmanager
def _parsed_once(path: Path) -> Iterator[None]:
    """transformers parses a GGUF file for the configuration, the weights and the tokenizer in turn, and makes
    the table of tensor names for every module of the model: inside, each once, which halves the time."""
    with reading(path):
        import gguf

    theirs = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in theirs.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in theirs.items():
            setattr(gguf, name, function)


def _convert(path: Path, alone: Path, info: GgufInfo, target: Path) -> None:
    with reading(path):
        from safetensors.torch import save_model
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        given = {"gguf_file": "model.gguf", "local_files_only": True, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(alone, **given)
    _check_numbers(config.to_dict(), len(info.tensors), str(path))
    _check_size(lambda: AutoModelForCausalLM.from_config(config), info.elements, str(path))
    with reading(path):
        module, found = AutoModelForCausalLM.from_pretrained(
            alone, config=config, dtype=torch.float32, output_loading_info=True, **given
        )
        _check_complete(found, path)
        tokenizer = AutoTokenizer.from_pretrained(alone, **given)
        described = module.config.to_dict()
        described.pop("quantization_config", None)  # says gguf; the weights are plain float32 now
        described.pop("_name_or_path", None)  # the folder that is gone
        (target / "config.json").write_text(json.dumps(described), encoding="utf-8")
        module.generation_config.save_pretrained(target)
        tokenizer.save_pretrained(target)
        save_model(module, str(target / "model.safetensors"), metadata={"format": "pt"})


def _check_gguf_model(info: GgufInfo, where: str) -> None:
    """The numbers that size the model: bounded by the file before transformers builds anything from them."""
    if not isinstance(info.metadata.get("general.architecture"), str):
        raise LoadError("has no general.architecture", where=where, remedy="is it a language model?")
    if "token_embd.weight" not in info.tensors:
        raise LoadError("has no token_embd.weight tensor", where=where, remedy="is it a language model?")
    _check_numbers(info.metadata, len(info.tensors), where)


def _check_numbers(values: Mapping[str, Any], tensors: int, where: str) -> None:
    """Refuse numbers no real model has, before a library loops over them or allocates by them."""
    pending: list[tuple[str, Any]] = list(values.items())
    while pending:
        name, value = pending.pop()
        if isinstance(value, Mapping):
            pending += value.items()
        elif isinstance(value, (list, tuple)):
            pending += ((name, item) for item in value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            key = str(name)
            cap = _COUNT_CAP if _COUNT.search(key.rsplit(".", 1)[-1]) else _NUMBER_CAP
            if "layer" in key and key.startswith("num") or key.endswith("block_count"):
                cap = max(1, tensors)
            if abs(value) > cap and value != float("-inf"):
                raise LoadError(
                    f"{show(key)} is {show(value)}, more than a model with {tensors} tensors has", where=where
                )


def _without_memory(build: Any, where: str) -> nn.Module:
    with reading(Path(where)), torch.device("meta"):
        module: nn.Module = build()
    return module


def _check_size(build: Any, elements: int, where: str) -> None:
    """Build the model without memory and compare it with what the files hold."""
    module = _without_memory(build, where)
    described = sum(parameter.numel() for parameter in module.parameters())
    if described > 2 * elements + (1 << 20):
        raise LoadError(f"describes {described} parameters and its weights hold {elements}", where=where)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    if buffers > _BUFFER_CAP:
        raise LoadError(f"describes tables of {buffers} bytes, more than {_BUFFER_CAP}", where=where)


def _check_complete(found: Mapping[str, Any], path: Path, used: Collection[str] = ()) -> None:
    """Every parameter must have come from the file: a missing one would silently be random.

    used: tensors that are read otherwise.
    """
    for what, text in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape of")):
        if names := sorted(str(item) for item in found.get(what) or ()):
            raise LoadError(f"{text} {len(names)} tensors, first {show(names[0])}", where=str(path))
    if names := sorted(str(item) for item in found.get("unexpected_keys") or () if item not in used):
        _log.warning("%s: %d tensors are not used, first %s", path, len(names), show(names[0]))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a third-party reader raises about a foreign file into one LoadError; keep it quiet."""
    try:
        with _quiet():
            yield
    except (TilewrightError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except ImportError as error:
        remedy = "pip install 'tilewright[demo]'"
        raise LoadError(
            f"{error.name or error} is needed to read it", where=str(path), remedy=remedy
        ) from error
    except BaseException as error:  # a panic of a reader written in Rust is not an Exception
        text = f"{type(error).__name__}: {ascii(' '.join(str(error).split())[:160])[1:-1]}"
        raise LoadError(f"cannot be read: {text}", where=str(path)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, no tables of warnings from transformers: what matters is checked and raised here."""
    from transformers.utils import logging as their_logging

    bars, level = their_logging.is_progress_bar_enabled(), their_logging.get_verbosity()
    their_logging.disable_progress_bar()
    their_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        their_logging.set_verbosity(level)
        if bars:
            their_logging.enable_progress_bar()


def _file_sha256(path: Path) -> str:
    with open_model_file(path) as (file, _):
        return hashlib.file_digest(file, "sha256").hexdigest()


def _source_sha256(*functions: Callable[..., Any]) -> str:
    return hashlib.sha256("".join(map(inspect.getsource, functions)).encode()).hexdigest()


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
