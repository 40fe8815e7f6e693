"""Raise the product of an activated gate and a second linear, activation(gate) * up, to one `gated_mlp` op.

paper: arXiv:2002.05202 (GLU variants). The linear layers around it stay linear ops of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx

from tilewright.compiler import (
    ACCEPT,
    Exactness,
    Example,
    Match,
    Rewrite,
    Stage,
    Tensor,
    Verdict,
    either,
    free,
    known_equal,
    number,
    ops,
    refuse,
    rewrite_pass,
)
from tilewright.compiler.pattern import constant_of

aten = torch.ops.aten

_CONSTANTS = {"half": 0.5, "cubic": 0.044715, "inner": math.sqrt(2 / math.pi), "root": math.sqrt(0.5)}
_TOLERANCE = 1e-6
"""Relative: models write these constants in full or rounded to float32."""


@rewrite_pass("match-gated-mlp", stage=Stage.NORMALIZE, exactness=Exactness.ROUNDING, trains=True)
class MatchGatedMlp(Rewrite):
    """Recognise activation(gate) * up over tensors of one shape.

    rewrite:
        act(gate) * up   with act one of silu, gelu, gelu(tanh), relu, sigmoid, each also written out
     -> gated_mlp(gate, up, act)

    A gate that is also the other factor (silu written as x * sigmoid(x)) is an activation, not a gated MLP.
    """

    near_miss_depth = 3

    @staticmethod
    def pattern(gate, up):
        cube = either("order", power=aten.pow(gate, 3), product=gate * aten.pow(gate, 2))
        curve = aten.tanh(number("inner") * (gate + number("cubic") * cube)) + 1.0
        error = aten.erf(either("order", times=gate * number("root"), over=gate / number("root"))) + 1.0
        scaled = number("half") * gate
        activated = either(
            "act",
            silu=aten.silu(gate),
            gelu=aten.gelu(gate, approximate=free("approximate")),
            relu=aten.relu(gate),
            silu_written=gate * aten.sigmoid(gate),
            gelu_tanh_written=scaled * curve,
            gelu_tanh_regrouped=number("half") * (gate * curve),
            gelu_erf_written=scaled * error,
            gelu_erf_regrouped=gate * (number("half") * error),
            sigmoid=aten.sigmoid(gate),
        )
        yield "product", activated * up

    def where(self, m: Match) -> Verdict:
        for name in ("gate", "up"):
            if not m.is_tensor(name):
                return refuse(f"{name} is {m[name]}, expected a tensor", at=m[name])
        if m["gate"] is m["up"] or _is_multiple(m["gate"], m["up"]):
            return refuse("gate and up are one value: this is an activation", at=m["gate"])
        gate, up = m.shape("gate"), m.shape("up")
        if len(gate) != len(up) or not all(known_equal(p, q) for p, q in zip(gate, up, strict=True)):
            return refuse(f"gate has shape {tuple(gate)}, up has {tuple(up)}", at=m["up"])
        if (no := m.same_dtype("gate", "up")) is not None:
            return no
        if not m.val("gate").is_floating_point():
            return refuse(f"gate is {m.dtype('gate')}", at=m["gate"])
        for name, wanted in _CONSTANTS.items():
            if name == "root" and m["order"] == "over":
                wanted = 1 / wanted
            if m[name] is not None and not math.isclose(m[name], wanted, rel_tol=_TOLERANCE):
                return refuse(f"the constant {name} is {m[name]}, gelu has {wanted:.7g}")
        return ACCEPT

    def replacement(self, gate, up, chosen):
        act = chosen["act"]
        if act.startswith("gelu"):
            tanh = chosen.get("approximate") == "tanh" or act.startswith("gelu_tanh")
            return ops.gated_mlp(gate, up, "gelu_tanh" if tanh else "gelu")
        return ops.gated_mlp(gate, up, act.removesuffix("_written"))

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        pair = (Tensor(2, 5, 12), Tensor(2, 5, 12))

        def new_gelu(x, c=0.044715):
            return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + c * torch.pow(x, 3.0))))

        yield {}, Example(lambda g, u: F.silu(g) * u, pair)
        yield {}, Example(lambda g, u: u * F.gelu(g), pair)
        yield {}, Example(lambda g, u: F.gelu(g, approximate="tanh") * u, pair)
        yield {}, Example(lambda g, u: F.relu(g) * u, pair)
        yield {}, Example(lambda g, u: torch.sigmoid(g) * u, pair)
        yield {}, Example(lambda g, u: g * torch.sigmoid(g) * u, pair)
        yield {}, Example(lambda g, u: new_gelu(g) * u, pair)
        yield {}, Example(lambda g, u: g * 0.5 * (1.0 + torch.erf(g / math.sqrt(2.0))) * u, pair)
        yield {}, Example(lambda g, u: new_gelu(g, 0.05) * u, pair, refusal="cubic is 0.05")
        yield (
            {},
            Example(lambda g, u: F.silu(g) * u, (pair[0], Tensor(2, 1, 12)), refusal="up has (2, 1, 12)"),
        )
        yield {}, Example(lambda g: g * torch.sigmoid(g), pair[:1], refusal="this is an activation")
        yield {}, Example(lambda g: g * torch.sigmoid(1.702 * g), pair[:1], refusal="this is an activation")
        yield {}, Example(lambda g: F.silu(g) * 2.0, pair[:1], refusal="up is 2.0")
        wide = Tensor(2, 5, 12, dtype=torch.float64)
        yield {}, Example(lambda g, u: F.silu(g) * u, (pair[0], wide), refusal="float64")
        counts = Tensor(2, 5, 12, dtype=torch.int64)
        yield {}, Example(lambda g, u: F.relu(g) * u, (counts, counts), refusal="gate is torch.int64")


def _is_multiple(gate: fx.Node, up: fx.Node) -> bool:
    """True for x * c of x, as in the quick gelu x * sigmoid(1.702 x)."""
    return (
        gate.target is aten.mul.Tensor
        and up in gate.args
        and constant_of(gate.args[gate.args[0] is up])[0] is not None
    )
