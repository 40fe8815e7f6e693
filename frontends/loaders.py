"""MODEL: from what the user writes to a module with a tokenizer and example inputs.

MODEL is a bundled name, a Hugging Face folder, a .gguf file, or `package.module:factory`. Nothing is
unpickled, no code out of a model file runs, and nothing is fetched from the network: every file is checked
before the library that reads it sees it, and what that library then says is turned into one LoadError.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tilewright.compiler.diagnostics import LoadError, nearest
from tilewright.frontends.export.artifact import is_artifact
from tilewright.frontends.foreign_files import refuse_onnx, refuse_pt2
from tilewright.frontends.loaded_model import Call, LoadedModel
from tilewright.frontends.model_files import model_file, show

__all__ = ["Call", "LoadedModel", "resolve"]

if TYPE_CHECKING:
    from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_FACTORY = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
_NAME_CAP = 4096
"""Characters of MODEL; the longest path Linux takes."""
_SUFFIXES = (".gguf", ".pt2", ".onnx", ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt")


def resolve(model: str, *, weights: str | None = None) -> LoadedModel:
    """Load MODEL.

    `weights`: a .safetensors file whose tensors replace the module's; every name and shape must match.
    Raises LoadError, one line `MODEL: what (hint)`, for anything that cannot be loaded.
    """
    from tilewright.frontends.bundled_models import BUNDLED

    if not isinstance(model, str) or not model.isprintable() or not 0 < len(model) <= _NAME_CAP:
        raise LoadError(
            "is not a model", where=show(model), remedy="give a name, a folder, a file or module:factory"
        )
    if model in BUNDLED:
        loaded = BUNDLED[model]()
    elif os.path.lexists(model) or model.endswith(_SUFFIXES) or os.sep in model:
        loaded = _from_path(Path(model))
    elif match := _FACTORY.fullmatch(model):
        loaded = _from_factory(model, match[1], match[2])
    else:
        raise LoadError(
            "no such model, folder or file", where=show(model)[1:-1], remedy=nearest(model, BUNDLED)
        )
    if weights is not None:
        _replace_weights(loaded.module, weights)
    loaded.module.eval()
    return loaded


def _replace_weights(module: nn.Module, weights: str) -> None:
    from tilewright.frontends.weights import replace_weights

    if not weights.isprintable() or not weights.endswith(".safetensors"):
        raise LoadError("is not a .safetensors file", where=f"weights={show(weights)}")
    replace_weights(module, [Path(weights)])


def _from_path(path: Path) -> LoadedModel:
    from tilewright.frontends.hugging_face import load_folder, load_gguf

    if os.path.isdir(path):
        if is_artifact(path):
            remedy = "`tilewright run` and `tilewright.load_language_model` take an exported language model"
            raise LoadError("is an export, which was rewritten already", where=str(path), remedy=remedy)
        return load_folder(path)
    model_file(path)
    if path.suffix == ".gguf":
        return load_gguf(path)
    if path.suffix == ".onnx":
        raise refuse_onnx(path)
    if path.suffix == ".pt2":
        raise refuse_pt2(path)
    if path.suffix == ".safetensors":
        raise LoadError(
            "holds weights without a model",
            where=str(path),
            remedy="give its folder, or a model with weights=FILE",
        )
    if path.suffix in _SUFFIXES:
        raise LoadError(
            "is a pickle file, which can run code when it is read",
            where=str(path),
            remedy="convert to safetensors",
        )
    raise LoadError(
        f"has the unknown ending {show(path.suffix)}",
        where=str(path),
        remedy="a folder, .gguf, .onnx or .pt2",
    )


def _from_factory(model: str, module_name: str, attribute: str) -> LoadedModel:
    """Call the user's own factory; its errors inside its body are the user's and pass through."""
    from torch import nn

    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise LoadError(
            f"there is no module {error.name}", where=model, remedy="is it on PYTHONPATH?"
        ) from None
    except AttributeError:
        raise LoadError(f"module {module_name} has no {attribute}", where=model) from None
    if not callable(factory):
        raise LoadError(f"{attribute} is {type(factory).__name__}, not a factory function", where=model)
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise LoadError(f"{attribute} cannot be called without arguments: {error}", where=model) from None
    except ValueError:
        pass  # a builtin without a signature: calling it will tell
    made = factory()
    module, args = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module) or not (args is None or isinstance(args, tuple)):
        raise LoadError(
            f"{attribute}() gave {type(made).__name__}",
            where=model,
            remedy="return a torch.nn.Module, or (module, args) with a tuple of example arguments",
        )

    def call(length: int | None) -> Call:
        if args is None:
            raise LoadError(
                "has no example arguments", where=model, remedy="let the factory return (module, args)"
            )
        return args, {}

    return LoadedModel(model, "module", module, None, {"call": call})
