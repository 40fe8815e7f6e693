"""Which stages a stretch of a decode graph consists of: nodes in, a list of stages or a refusal out.

With one row of activations every value is a short vector, and every view of it has the same elements in the
same order. So values are flat buffers, views are the same buffer, and a stage is one of a dozen kinds.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tilewright.compiler.float_format import parse_format
from tilewright.compiler.graph import normalized_args
from tilewright.compiler.ops import semantic_op
from tilewright.compiler.weight_format import WeightFormat
from tilewright.runtime.contracts import Refusal

aten = torch.ops.aten
VIEWS = (
    aten.reshape.default,
    aten.view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.contiguous.default,
)
UNARY = {aten.silu.default: "silu", aten.relu.default: "relu", aten.sigmoid.default: "sigmoid"}
BINARY = {aten.add.Tensor: "add", aten.mul.Tensor: "mul"}
MAX_HEAD = 512


@dataclass(frozen=True)
class Stage:
    """One step: `kind` with its constants; `reads` and `writes` are numbers of values, -1 where absent."""

    kind: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    numbers: tuple[int | float | str, ...] = ()


@dataclass(frozen=True)
class Given:
    """One input: its value, dtype and sizes; `written` if the function writes to it."""

    value: int
    dtype: str
    sizes: tuple[int, ...]
    written: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything the generator needs: equal plans are one source."""

    inputs: tuple[Given, ...]
    sizes: tuple[int, ...]
    """Elements of every value, by number."""
    stages: tuple[Stage, ...]
    outputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Shape of each output."""
    scalars: frozenset[int] = field(default=frozenset())
    """Values that are one int64."""


class Unsupported(Exception):
    """Why a node cannot become a stage."""


class Planner:
    """Turns the nodes of one stretch into stages."""

    def __init__(
        self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
    ) -> None:
        self.nodes, self.inputs, self.outputs = nodes, inputs, outputs
        self.number: dict[fx.Node, Any] = {}
        self.sizes: list[int] = []
        self.scalars: set[int] = set()
        self.stages: list[Stage] = []
        self.states = {n.args[0]: n.args[1] for n in nodes if n.target is aten.copy_.default}

    def plan(self) -> Plan | Refusal:
        """The plan, or the first node that has none and why."""
        node: fx.Node | None = None
        try:
            for node in self.inputs:
                self._input(node)
            for node in self.nodes:
                self._stage(node)
            for node in self.outputs:
                number = self.number.get(node)
                if not isinstance(number, int) or number in self.scalars:
                    raise Unsupported("it leaves the stretch and is not a float vector")
        except Unsupported as reason:
            return Refusal(f"{node.name if node else ''} ({node.target if node else ''}): {reason}")
        given = tuple(
            Given(self.number[n], _dtype(n), tuple(n.meta["val"].shape), n in self.states)
            for n in self.inputs
        )
        return Plan(
            given,
            tuple(self.sizes),
            tuple(self.stages),
            tuple(self.number[n] for n in self.outputs),
            tuple(tuple(n.meta["val"].shape) for n in self.outputs),
            frozenset(self.scalars),
        )

    def _input(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            raise Unsupported("an input that is not a CPU tensor")
        if not all(isinstance(s, int) for s in (*value.shape, *value.stride())):
            raise Unsupported("its size is not known when compiling")
        if value.dtype not in (torch.float32, torch.int64, torch.bool, torch.uint8):
            raise Unsupported(f"it is {value.dtype}; the stretch computes in float32")
        if not value.is_contiguous():
            raise Unsupported(f"its strides {value.stride()} are not contiguous")
        self.number[node] = self._new(value.numel())
        if value.dtype == torch.int64:
            if value.numel() != 1:
                raise Unsupported(f"an int64 input of {value.numel()} elements")
            self.scalars.add(self.number[node])

    def _new(self, size: int) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def _add(self, node: Any, kind: str, reads: Sequence[int], *numbers: int | float | str) -> None:
        self.number[node] = self._new(_elements(node))
        self.stages.append(Stage(kind, tuple(reads), (self.number[node],), numbers))

    def _of(self, value: Any) -> int:
        number = self.number.get(value) if isinstance(value, fx.Node) else None
        if not isinstance(number, int):
            raise Unsupported(f"argument {value} is not a tensor of the stretch")
        return number

    def _vector(self, value: Any) -> int:
        number = self._of(value)
        if number in self.scalars or _dtype(value) != "float32":
            raise Unsupported(f"argument {value} is not float32")
        return number

    def _optional(self, value: Any) -> int:
        return -1 if value is None else self._vector(value)

    def _stage(self, node: fx.Node) -> None:
        op = semantic_op(node.target)
        handler = getattr(self, f"_op_{op.name}", None) if op is not None else self._aten(node)
        if handler is None:
            raise Unsupported("no stage is generated for it")
        handler(node, *normalized_args(node).values()) if op is not None else handler(node)

    def _aten(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self._getitem
        if node.target is aten.copy_.default:
            return self._write_back
        if node.target in VIEWS:
            return self._view
        if node.target in UNARY:
            return self._unary
        return self._binary if node.target in BINARY else None

    def _getitem(self, node: fx.Node) -> None:
        source, index = node.args
        self.number[node] = self.number[source][index]  # type: ignore[index]

    def _view(self, node: fx.Node) -> None:
        source: Any = node.args[0]
        if not _keeps_order(source.meta["val"], node):
            raise Unsupported("it reorders elements")
        self.number[node] = self._of(source)

    def _unary(self, node: fx.Node) -> None:
        self._add(node, "unary", [self._vector(node.args[0])], UNARY[node.target])  # type: ignore[index]

    def _binary(self, node: fx.Node) -> None:
        a, b = node.args[:2]
        if node.kwargs or len(node.args) > 2:
            raise Unsupported("it has a factor")
        if self._is_scalar(a):
            self._scalar_sum(node, a, b)
        elif isinstance(b, (int, float)):
            self._add(node, "scaled", [self._vector(a)], BINARY[node.target], float(b))  # type: ignore[index]
        elif _elements(a) == _elements(b) == _elements(node):
            self._add(node, "binary", [self._vector(a), self._vector(b)], BINARY[node.target])  # type: ignore[index]
        else:
            raise Unsupported("it broadcasts")

    def _is_scalar(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and self.number.get(value) in self.scalars

    def _scalar_sum(self, node: fx.Node, a: Any, b: Any) -> None:
        if node.target is not aten.add.Tensor:
            raise Unsupported("integers are only added")
        reads = [self._of(a)]
        if isinstance(b, int):
            self._add(node, "sum", reads, b)
        elif self._is_scalar(b):
            self._add(node, "sum", [*reads, self._of(b)], 0)
        else:
            raise Unsupported("it adds an integer to something else")
        self.scalars.add(self.number[node])

    def _write_back(self, node: fx.Node) -> None:
        state: Any = node.args[0]
        value: Any = node.args[1]
        if self.number.get(state) is None or state not in self.inputs:
            raise Unsupported("it writes to something else than an input")
        if self._is_scalar(value):
            self.stages.append(Stage("store", (self._of(value),), (self._of(state),)))
        elif self._of(value) != self._of(state):
            raise Unsupported("the state is written by something else than kv_update")

    def _op_linear(self, node: fx.Node, x: Any, weight: Any, bias: Any) -> None:
        self.number[node] = self._linears(x, [weight], [bias])[0]

    def _op_linear_multi(self, node: fx.Node, x: Any, weights: Any, biases: Any) -> None:
        self.number[node] = self._linears(x, weights, biases)

    def _linears(self, x: Any, weights: Sequence[Any], biases: Sequence[Any]) -> list[int]:
        source, made = self._vector(x), []
        for weight, bias in zip(weights, biases, strict=True):
            rows, columns = weight.meta["val"].shape
            if _elements(x) != columns:
                raise Unsupported(f"x has {_elements(x)} elements, a row of the weight {columns}")
            made.append(self._new(rows))
            reads = (source, self._vector(weight), self._optional(bias))
            self.stages.append(Stage("linear", reads, (made[-1],), (rows, columns)))
        return made

    def _op_quantized_linear(
        self, node: fx.Node, x: Any, packed: Any, bias: Any, rows: int, text: str
    ) -> None:
        self.number[node] = self._quantized(x, [packed], [bias], [rows], text)[0]

    def _op_quantized_linear_multi(
        self, node: fx.Node, x: Any, packed: Any, biases: Any, rows: Any, text: str
    ) -> None:
        self.number[node] = self._quantized(x, packed, biases, rows, text)

    def _quantized(
        self, x: Any, packed: Sequence[Any], biases: Sequence[Any], rows: Sequence[int], text: str
    ) -> list[int]:
        form, made = parse_format(text), list[int]()
        source, columns = self._vector(x), x.meta["val"].shape[-1]
        if isinstance(form, WeightFormat) and form.packing != "blocks8":
            raise Unsupported(f"the weights are packed as {form.packing}")
        for weight, bias, count in zip(packed, biases, rows, strict=True):
            if _elements(x) != columns or tuple(weight.meta["val"].shape) != form.shape(count, columns):
                raise Unsupported("x has several rows, or the weight is packed for another size")
            made.append(self._new(count))
            reads = (source, self._of(weight), self._optional(bias))
            self.stages.append(Stage("quantized_linear", reads, (made[-1],), (count, columns, text)))
        return made

    def _op_rms_norm(self, node: fx.Node, x: Any, weight: Any, eps: float, offset: float, _: str) -> None:
        width = x.meta["val"].shape[-1]
        reads = [self._vector(x), self._optional(weight)]
        self._add(node, "rms_norm", reads, _elements(x) // width, width, eps, offset)

    def _op_add_rms_norm(
        self, node: fx.Node, x: Any, residual: Any, weight: Any, eps: float, offset: float, _: str
    ) -> None:
        if _elements(x) != _elements(residual):
            raise Unsupported("it broadcasts")
        width = x.meta["val"].shape[-1]
        total, normed = self._new(_elements(x)), self._new(_elements(x))
        self.stages.append(Stage("binary", (self._vector(residual), self._vector(x)), (total,), ("add",)))
        numbers = (_elements(x) // width, width, eps, offset)
        self.stages.append(Stage("rms_norm", (total, self._optional(weight)), (normed,), numbers))
        self.number[node] = [normed, total]

    def _op_layer_norm(self, node: fx.Node, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> None:
        if len(shape) != 1:
            raise Unsupported("it normalises several axes")
        reads = [self._vector(x), self._optional(weight), self._optional(bias)]
        self._add(node, "layer_norm", reads, _elements(x) // shape[0], shape[0], eps)

    def _op_gated_mlp(self, node: fx.Node, gate: Any, up: Any, activation: str) -> None:
        self._add(node, "gated", [self._vector(gate), self._vector(up)], activation)

    def _op_rope(self, node: fx.Node, x: Any, cos: Any, sin: Any, interleaved: bool) -> None:
        width = x.meta["val"].shape[-1]
        if interleaved or _elements(cos) != width or _elements(sin) != width or width % 2:
            raise Unsupported("it is interleaved, or its tables are not one row")
        reads = [self._vector(x), self._vector(cos), self._vector(sin)]
        self._add(node, "rope", reads, _elements(x) // width, width)

    def _op_kv_update(self, node: fx.Node, cache: Any, new: Any, positions: Any, dim: int) -> None:
        shape = cache.meta["val"].shape
        if self.states.get(cache) is not node or cache not in self.inputs:
            raise Unsupported("its result is not written back to the cache")
        if any(user is not node and user.target is not aten.copy_.default for user in cache.users):
            raise Unsupported("the cache is also read as it was before")
        if len(shape) != 4 or shape[0] != 1 or dim % 4 != 2 or not self._is_scalar(positions):
            raise Unsupported("the cache is not [1, heads, length, width] with one new position")
        reads = (self._vector(new), self._of(positions))
        numbers = (shape[1], shape[2], shape[3])
        self.stages.append(Stage("kv_update", reads, (self._vector(cache),), numbers))
        self.number[node] = self._of(cache)

    def _op_attention(
        self,
        node: fx.Node,
        q: Any,
        k: Any,
        v: Any,
        mask: Any,
        scale: Any,
        causal: bool,
        softcap: float,
        sinks: Any,
    ) -> None:
        if causal or softcap != 0.0 or sinks is not None:
            raise Unsupported("causal, softcap and sinks are not generated for one query")
        queries, keys, values = (t.meta["val"].shape for t in (q, k, v))
        heads, length, width = keys[-3:]
        if math.prod(keys[:-3]) != 1 or max(width, values[-1]) > MAX_HEAD or values[-1] % 8 or width % 8:
            raise Unsupported(f"keys {list(keys)}, values {list(values)}")
        if mask is not None and _elements(mask) != length:
            raise Unsupported(f"mask {list(mask.meta['val'].shape)} is not one row of {length}")
        if mask is not None and _dtype(mask) not in ("bool", "float32"):
            raise Unsupported(f"mask is {_dtype(mask)}")
        group = math.prod(queries) // (heads * width)
        factor = width**-0.5 if scale is None else scale
        reads = [self._vector(q), self._vector(k), self._vector(v), -1 if mask is None else self._of(mask)]
        kind = "none" if mask is None else _dtype(mask)
        self._add(node, "attention", reads, heads, group, length, width, values[-1], factor, kind)


def _elements(node: Any) -> int:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or not all(isinstance(s, int) for s in value.shape):
        raise Unsupported("its size is not known when compiling")
    return value.numel()


def _dtype(node: Any) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _keeps_order(before: torch.Tensor, node: fx.Node) -> bool:
    """True when the result has the same elements in the same order."""
    after = node.meta["val"]
    if before.numel() != after.numel():
        return False
    if node.target in (aten.permute.default, aten.transpose.int):
        if node.target is aten.transpose.int:
            order = list(range(before.dim()))
            i, j = (int(a) % before.dim() for a in node.args[1:3])  # type: ignore[arg-type,call-overload]
            order[i], order[j] = order[j], order[i]
        else:
            order = [int(d) % before.dim() for d in node.args[1]]  # type: ignore[union-attr,arg-type,call-overload]
        wide = [d for d in order if before.shape[d] != 1]
        return wide == sorted(wide)
    return True


def plan(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Plan | Refusal:
    """The stages of a stretch: all of its nodes, or a refusal that names the first one in the way."""
    return Planner(nodes, inputs, outputs).plan()
