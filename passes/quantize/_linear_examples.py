"""The example programs of quantize-linear."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tilewright.compiler import Example, Tensor, ops
from tilewright.compiler.weight_format import WeightFormat


class _NotFinite(Tensor):
    """An example weight with one NaN."""

    def make(self, generator: torch.Generator) -> torch.Tensor:
        made = super().make(generator)
        made[0, 0] = float("nan")
        return made


def examples() -> Iterator[tuple[dict, Example]]:
    """Every accepting and refusing path of quantize-linear."""
    x, w = Tensor(2, 5, 70), Tensor(13, 70, weight=True)
    b, v = Tensor(13, weight=True), Tensor(6, 70, weight=True)

    def two(x, w, b, v):
        return ops.linear(x, w, b).relu(), ops.linear(x, v).relu()

    yield {}, Example(two, (x, w, b, v), count=2)
    yield {"weight": "int4", "group": 32, "mode": "float-zero"}, Example(two, (x, w, b, v), count=2)
    yield {"weight": "int3", "group": 64}, Example(two, (x, w, b, v), count=2)
    yield (
        {"weight": "int2", "group": 32, "mode": "float-zero", "rounding": "hqq"},
        Example(two, (x, w, b, v), count=2),
    )
    yield (
        {"weight": "int4", "group": 32, "mode": "float-zero", "rounding": "whole-zero"},
        Example(two, (x, w, b, v), count=2),
    )
    for weight, group, activation in (("int8", 0, "int8-token"), ("int4", 32, "int8-group")):
        options = {"weight": weight, "group": group, "activation": activation}
        yield options, Example(two, (x, w, b, v), count=2)
    y, u = Tensor(2, 5, 96), Tensor(13, 96, weight=True)
    floats: tuple[dict[str, object], ...] = (
        {"weight": "fp8-e4m3"},
        {"weight": "fp8-e5m2", "per_tensor": True},
        {"weight": "fp8-e4m3", "group": 32, "activation": "fp8-token"},
        {"weight": "nvfp4"},
    )
    for chosen in floats:
        yield chosen, Example(lambda x, w, b: ops.linear(x, w, b).relu(), (y, u, b))
    one = Example(lambda x, w: ops.linear(x, w).relu(), (x, w))
    yield {"head": True}, one
    yield {}, Example(lambda x, w: ops.linear(x, w)[:, -1:], (x, w), refusal="a head stays")
    yield {}, Example(lambda x, w: ops.linear(x, w * 2).relu(), (x, w), refusal="is computed")
    yield (
        {"weight": "int4", "group": 96},
        Example(one.model, one.inputs, refusal="fewer than a group of 96"),
    )
    for weight, group, size in (("fp8-e4m3", 64, 64), ("nvfp4", 0, 16)):
        refusal = f"no whole groups of {size}"
        yield {"weight": weight, "group": group}, Example(one.model, one.inputs, refusal=refusal)
    yield {}, Example(one.model, (x, _NotFinite(13, 70, weight=True)), refusal="holds 1 NaN")
    huge = Tensor(13, 70, gain=1e5, weight=True)
    yield {"weight": "int4", "group": 32}, Example(one.model, (x, huge), refusal="float16 scales")
    packed = torch.zeros(2, 1216, dtype=torch.uint8)
    form = WeightFormat(4, 32).text
    yield (
        {},
        Example(
            lambda x, p: ops.quantized_linear(x, p, None, 13, form),
            (x, packed),
            refusal="quantized already",
        ),
    )
