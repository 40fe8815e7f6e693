"""Linear layers whose weights a checkpoint stores quantized: what is common to the layouts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tilewright.compiler.diagnostics import LoadError
from tilewright.compiler.quantizers import Quantized
from tilewright.compiler.weight_format import WeightFormat
from tilewright.frontends.gguf_blocks import QuantizedLinear
from tilewright.frontends.model_files import show
from tilewright.frontends.safetensors_check import TensorHeader

FLOATS = ("F32", "F16", "BF16")


class Checkpoint:
    """The tensors of checked safetensors files; open while it is a context."""

    def __init__(self, folder: Path, files: Mapping[Path, Mapping[str, TensorHeader]]) -> None:
        self.where = str(folder)
        self.files = list(files)
        self.headers = {name: header for found in files.values() for name, header in found.items()}
        self._file = {name: path for path, found in files.items() for name in found}
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._open[path]

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the dtype of the file."""
        found: Tensor = self._handle(self._file[name]).get_tensor(name)
        return found

    def metadata(self) -> dict[str, str]:
        """The texts that the files carry beside their tensors."""
        found: dict[str, str] = {}
        for path in self.files:
            found.update(self._handle(path).metadata() or {})
        return found

    def require(self, name: str, dtypes: Collection[str], *shapes: tuple[int, ...]) -> None:
        """LoadError unless the tensor is there in one of the dtypes and shapes."""
        header = self.headers.get(name)
        if header is None:
            raise LoadError(f"lacks tensor {show(name)}", where=self.where)
        if header.dtype not in dtypes:
            what = f"tensor {show(name)} is {header.dtype}, not {' or '.join(dtypes)}"
            raise LoadError(what, where=self.where)
        if header.shape not in shapes:
            want = " or ".join(str(list(shape)) for shape in shapes)
            what = f"tensor {show(name)} has shape {list(header.shape)}; the layer needs {want}"
            raise LoadError(what, where=self.where)


@dataclass(frozen=True)
class StoredLinear:
    """One layer: where its codes and grids are and what they mean."""

    name: str
    shape: tuple[int, int]
    """[N, K] of the weight."""
    form: WeightFormat
    tensors: frozenset[str]
    """What the layer takes from the files; its bias is not among them."""
    codes: Callable[[Checkpoint], Tensor]
    """uint8 [N, K]."""
    grids: Callable[[Checkpoint], tuple[Tensor, Tensor]]
    """(scale, offset), float32 [N, G] each."""

    def checked_grids(self, files: Checkpoint) -> tuple[Tensor, Tensor]:
        """The grids; LoadError for NaN or infinite ones."""
        for part in (found := self.grids(files)):
            bad = int((~torch.isfinite(part)).sum())
            if bad:
                what = (
                    f"layer {show(self.name)}: {bad} of {part.numel()} scales or offsets are NaN or infinite"
                )
                raise LoadError(what, where=files.where)
        return found

    def load(self, files: Checkpoint, bias: Tensor | None) -> QuantizedLinear:
        """The layer, holding the weight as the kernels read it: the same codes and grids, rounded nowhere."""
        rows, columns = self.shape
        scale, offset = self.checked_grids(files)
        form = self.form
        if form.has_offset and torch.equal(offset, -form.middle * scale):
            form = dataclasses.replace(form, mode="symmetric")  # zero points that say nothing are not kept
        stored = (scale, offset) if form.has_offset else (scale,)
        if form.group and not all(torch.equal(part.half().float(), part) for part in stored):
            form = dataclasses.replace(form, grid="wide")
        packed = form.pack(Quantized(self.codes(files), scale, offset, form.group))
        return QuantizedLinear(packed, rows, columns, bias, form)


def make_form(bits: int, group: int, columns: int, *, offset: bool, activation: str = "none") -> WeightFormat:
    """The kernels' format of a stored one; OptionError where there is none. A group of the whole row is 0."""
    mode = "float-zero" if offset else "symmetric"
    return WeightFormat(bits, 0 if group == columns else group, mode, activation)  # type: ignore[arg-type]


def nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, B] -> uint8 [N, 2 B]: the low nibble of each byte, then its high one."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> [N, K] of the linear layers of a model."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }


class Awaited(nn.Module):
    """Stands for a layer whose weight comes later: it has the bias, if any, and no weight."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.register_parameter("bias", bias)


def without_weights(model_class: type[nn.Module], names: Collection[str]) -> type[nn.Module]:
    """The class with those linear layers left out, so that no float weight is ever made for them."""

    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        for name in names:
            _put(self, name, Awaited(self.get_submodule(name).bias))  # type: ignore[arg-type]

    return type(
        model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__}
    )


def fill(module: nn.Module, layers: Collection[StoredLinear], files: Checkpoint) -> None:
    """Put the layers into a module of `without_weights`."""
    for layer in layers:
        bias = module.get_submodule(layer.name).bias
        _put(module, layer.name, layer.load(files, None if bias is None else bias.data.clone()))  # type: ignore[operator, union-attr]


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, layer)


def weight_count(layers: Collection[StoredLinear]) -> int:
    """Weights of all layers."""
    return sum(math.prod(layer.shape) for layer in layers)
