"""Model folders whose config.json has a quantization_config: which layout and layers, all checked first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tilewright.compiler.diagnostics import LoadError
from tilewright.frontends.compressed_tensors import compressed_linears
from tilewright.frontends.model_files import show
from tilewright.frontends.stored_linear import Checkpoint, StoredLinear, linear_shapes
from tilewright.frontends.torchao_weights import torchao_linears

METHODS = ("compressed-tensors", "torchao")


def check_method(raw: Mapping[str, Any], where: str) -> Mapping[str, Any] | None:
    """The quantization_config of a config.json, None without one; LoadError for one that is not read."""
    if "quantization_config" not in raw:
        return None
    config = raw["quantization_config"]
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(config, dict) or method not in METHODS:
        remedy = f"{' and '.join(METHODS)} are read; or give the unquantized model"
        raise LoadError(f"its weights are quantized, quant_method {show(method)}", where=where, remedy=remedy)
    return config


def find_layers(
    config: Mapping[str, Any], files: Checkpoint, model: nn.Module, where: str
) -> list[StoredLinear]:
    """The layers that the files hold quantized, tensors and grids checked; LoadError for a fault.

    model: the model in float, on any device. where: the file that config was read from.
    """
    linears = linear_shapes(model)
    if config["quant_method"] == "torchao":
        layers = torchao_linears(files, linears)
    else:
        layers = compressed_linears(config, files, linears, where)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for layer in layers:
        if f"{layer.name}.weight" in tied:
            what = f"layer {show(layer.name)} is quantized, but shares its weight with another one"
            raise LoadError(
                what, where=where, remedy="set tie_word_embeddings to false, or leave the layer out"
            )
        layer.checked_grids(files)
    return layers
