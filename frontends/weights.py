"""Putting checked safetensors weights into a module that exists already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from tilewright.compiler.diagnostics import LoadError, nearest
from tilewright.frontends.model_files import show
from tilewright.frontends.safetensors_check import TensorHeader, check_safetensors


def replace_weights(module: nn.Module, files: Sequence[Path]) -> None:
    """Replace every tensor of the module by those of the files, converted to the module's dtypes.

    Names and shapes must match exactly; tensors tied in the module need to be there once.
    Raises LoadError before anything is changed.
    """
    state = module.state_dict()
    headers = {path: check_safetensors(path) for path in files}
    for path, found in headers.items():
        _check_known(found, state, path)
    given = {name for found in headers.values() for name in found}
    storages = {state[name].data_ptr() for name in given}
    for name, tensor in state.items():
        if name not in given and (tensor.numel() == 0 or tensor.data_ptr() not in storages):
            raise LoadError(f"lacks tensor {show(name)} of the model", where=str(files[0]))
    for path in files:
        module.load_state_dict(load_file(path), strict=False)


def _check_known(found: Mapping[str, TensorHeader], state: Mapping[str, Tensor], path: Path) -> None:
    for name, header in found.items():
        if name not in state:
            what = f"tensor {show(name)} is not in the model"
            raise LoadError(what, where=str(path), remedy=nearest(name, state))
        if header.shape != tuple(state[name].shape):
            what = f"tensor {show(name)} has shape {header.shape}; the model has {tuple(state[name].shape)}"
            raise LoadError(what, where=str(path))
