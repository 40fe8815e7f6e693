"""What each node of a graph costs: flops, bytes and launches as formulas in the dynamic sizes.

The model is a plain one: a node reads each tensor it is given once and writes its result once, from and to
main memory, as one launch. Views cost nothing. Fusion by Inductor is not modelled, so the figures of a graph
are an upper bound of its traffic; a fused semantic op is one node. A multiply-add counts 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from tilewright.compiler.cost_rules import (
    FILLS,
    GATHERS,
    MAYBE_VIEWS,
    NO_COST,
    WRITES_INTO,
    Size,
    product,
    rule_flops,
    size_of,
    tensors_of,
)
from tilewright.compiler.devices import (
    DEVICES,
    DeviceDescriptor,
    device_named,
    measure_host,
    roofline_us,
)
from tilewright.compiler.module_paths import module_path, source_line
from tilewright.compiler.ops.registry import semantic_op
from tilewright.compiler.program import Program
from tilewright.compiler.report import NodeCost, Totals

__all__ = [
    "DEVICES",
    "Cost",
    "DeviceDescriptor",
    "device_named",
    "measure_host",
    "node_cost",
    "node_costs",
    "roofline_us",
    "size_values",
    "totals",
]


@dataclass(frozen=True)
class Cost:
    """Cost of one node; sizes are ints, or sympy expressions where the shape is dynamic."""

    flops: Size = 0
    bytes_read: Size = 0
    bytes_written: Size = 0
    launches: int = 0
    dtype: str = "float32"
    """dtype name the arithmetic runs in."""
    note: str = ""
    """What the figures leave out, empty when nothing."""


class _Sizes:
    """Element and byte counts of tensors, remembered by shape: a deep model repeats a few shapes."""

    def __init__(self) -> None:
        self._counts: dict[tuple[Size, ...], Size] = {}
        self._texts: dict[Size, str] = {}

    def count(self, shape: Sequence[Any]) -> Size:
        key = tuple(size_of(s) for s in shape)
        if key not in self._counts:
            self._counts[key] = product(key)
        return self._counts[key]

    def written(self, value: Any) -> Size:
        """Bytes of every tensor in a node's value."""
        return sum((self.count(t.shape) * t.element_size() for t in tensors_of(value)), 0)

    def read(self, tensor: torch.Tensor) -> Size:
        """Bytes a reader of the tensor touches: an expanded axis (stride 0) is stored once."""
        if tensor.layout is not torch.strided:
            return self.count(tensor.shape) * tensor.element_size()
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        kept = [size for size, stride in pairs if not (isinstance(stride, int) and stride == 0)]
        return self.count(kept) * tensor.element_size()

    def read_by(self, nodes: Sequence[fx.Node]) -> Size:
        """Bytes a reader of these nodes touches."""
        return sum((self.read(t) for n in nodes for t in tensors_of(n.meta["val"])), 0)

    def text(self, size: Size) -> str:
        if isinstance(size, int):
            return str(size)
        if size not in self._texts:
            self._texts[size] = str(size)
        return self._texts[size]


def _schema_name(target: Any) -> str:
    """`linear` for aten.linear.default; empty for what is not a torch op."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return ""


def _is_view(node: fx.Node, name: str, read: list[fx.Node]) -> bool:
    """True when the result is the memory of the first tensor read."""
    target: Any = node.target
    returns = target._schema.returns
    alias = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    if not read or not (alias or name in MAYBE_VIEWS):
        return False
    if name not in MAYBE_VIEWS:
        return True
    source, result = read[0].meta.get("val"), node.meta.get("val")
    if not isinstance(source, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    if source.untyped_storage()._cdata == result.untyped_storage()._cdata:
        return True
    # Values made by a pass do not always share storage: then decide as the op itself does.
    same = source.dtype == result.dtype and source.device == result.device
    return same and _is_contiguous(source)


def _is_contiguous(tensor: torch.Tensor) -> bool:
    """Row-major by the formulas of its strides; what cannot be told is not."""
    expected: Size = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if size_of(size) != 1 and size_of(stride) != expected:
            return False
        expected = expected * size_of(size)
    return True


def node_cost(node: fx.Node, sizes: _Sizes | None = None) -> Cost:
    """Cost of one call_function node, from `meta["val"]` of it and of what it reads.

    Nodes that run nothing (views, tuple access, size arithmetic, assertions) cost nothing.
    """
    sizes = sizes or _Sizes()
    name = _schema_name(node.target)
    if node.op != "call_function" or name in NO_COST:
        return Cost()
    value = node.meta.get("val")
    read = [n for n in node.all_input_nodes if tensors_of(n.meta.get("val"))]
    if not name:
        return _unknown_call(node, sizes, read)
    if not tensors_of(value):
        shapeless = value is None and bool(read)
        return Cost(note="no shape is known" if shapeless else "")
    if _is_view(node, name, read):
        return Cost()
    flops, note = _flops(node, name, value)
    moved_in, moved_out = _traffic(node, name, read, value, sizes)
    return Cost(flops, moved_in, moved_out, 1, _compute_dtype(read, value), note)


def _traffic(node: fx.Node, name: str, read: list[fx.Node], value: Any, sizes: _Sizes) -> tuple[Size, Size]:
    """Bytes read and written by a node that runs something."""
    moved_out = sizes.written(value)
    if name in FILLS:
        return 0, moved_out
    moved_in = sizes.read_by(read)
    if name in GATHERS:
        return moved_in - sizes.read_by(read[:1]) + moved_out, moved_out
    if name in WRITES_INTO and _writes_in_place(node, name):
        arguments = _argument_values(node.target, node.args, node.kwargs)
        new = arguments.get(WRITES_INTO[name])
        if isinstance(new, fx.Node):
            return moved_in - sizes.read_by(read[:1]), sizes.read_by([new])
    return moved_in, moved_out


def _writes_in_place(node: fx.Node, name: str) -> bool:
    """True when only the new values move: declared state, or a base that nobody reads afterwards."""
    if name == "kv_update" or name.endswith("_"):
        return True
    base = node.all_input_nodes[0]
    return all(u is node or u.op == "output" or _schema_name(u.target) == "copy_" for u in base.users)


def _unknown_call(node: fx.Node, sizes: _Sizes, read: list[fx.Node]) -> Cost:
    """A Python function or higher-order op: its bytes, when it takes or gives tensors."""
    value = node.meta.get("val")
    target: Any = node.target
    if getattr(target, "__module__", "") in ("_operator", "operator", "math") or not tensors_of(value):
        return Cost()
    moved = sizes.read_by(read)
    note = f"flops of {getattr(target, '__name__', target)} are not known"
    return Cost(0, moved, sizes.written(value), 1, _compute_dtype(read, value), note)


def _flops(node: fx.Node, name: str, value: Any) -> tuple[Size, str]:
    """Flops of a torch op and what they leave out."""
    args = fx.node.map_arg(node.args, lambda n: n.meta.get("val"))
    kwargs = fx.node.map_arg(node.kwargs, lambda n: n.meta.get("val"))
    semantic = semantic_op(node.target)
    if semantic is not None:
        return size_of(semantic.flops(*args, **kwargs, out=value)), ""
    target: Any = node.target
    known = rule_flops(name, target.tags, _argument_values(target, args, kwargs), value)
    if known is None:
        return 0, f"flops of {target} are not known"
    return known, ""


def _argument_values(target: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by schema name."""
    names = [a.name for a in target._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _compute_dtype(read: list[fx.Node], value: Any) -> str:
    """The floating dtype the arithmetic runs in: of the first floating input, else of the result."""
    candidates = [t for n in read for t in tensors_of(n.meta["val"])] + tensors_of(value)
    floating = [t.dtype for t in candidates if t.is_floating_point()]
    return str((floating or [t.dtype for t in candidates])[0]).removeprefix("torch.")


def size_values(module: fx.GraphModule) -> dict[str, int]:
    """What each dynamic size was when the graph was captured, by symbol; unbacked ones are left out."""
    values: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        dims = [value] if isinstance(value, torch.SymInt) else [s for t in tensors_of(value) for s in t.shape]
        for dim in dims:
            if isinstance(dim, torch.SymInt) and dim.node.expr.is_Symbol and dim.node.has_hint():
                values[str(dim.node.expr)] = int(dim.node.hint)
    return values


class _Numbers:
    """Numbers behind formulas at the captured sizes, remembered by formula."""

    def __init__(self, values: dict[str, int]) -> None:
        self._values = values
        self._seen: dict[sympy.Expr, float | None] = {}

    def __call__(self, size: Size) -> float | None:
        if isinstance(size, int):
            return float(size)
        if size not in self._seen:
            names = {s: self._values.get(str(s)) for s in size.free_symbols}
            known = None not in names.values()
            self._seen[size] = (
                float(size.xreplace({s: sympy.Integer(v) for s, v in names.items()})) if known else None
            )
        return self._seen[size]


def node_costs(
    program: Program | fx.GraphModule,
    device: DeviceDescriptor,
    where: Callable[[fx.Node], str] | None = None,
) -> list[NodeCost]:
    """Cost of every call in the graph, in order, with its roofline time on `device` at the captured sizes.

    `where` says what runs a node (a kernel name, `inductor`, `eager`); None leaves it open. A node
    whose sizes have no value (unbacked) keeps its formulas and has no numbers.
    """
    module = program.module if isinstance(program, Program) else program
    sizes, number = _Sizes(), _Numbers(size_values(module))
    rows = []
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        cost = node_cost(node, sizes)
        flops, moved = number(cost.flops), number(cost.bytes_read + cost.bytes_written)
        time_us = None
        if flops is not None and moved is not None:
            time_us = roofline_us(flops, moved, cost.launches, cost.dtype, device)
        rows.append(
            NodeCost(
                node=node.name,
                op=str(node.target) if _schema_name(node.target) else getattr(node.target, "__name__", "?"),
                flops=sizes.text(cost.flops),
                bytes_read=sizes.text(cost.bytes_read),
                bytes_written=sizes.text(cost.bytes_written),
                launches=cost.launches,
                roofline_us=time_us,
                where=where(node) if where is not None and cost.launches else "",
                source=source_line(node),
                module=module_path(node),
                flops_value=flops,
                bytes_value=moved,
                note=cost.note,
                inputs=[n.name for n in node.all_input_nodes],
            )
        )
    return rows


def totals(costs: Sequence[NodeCost]) -> Totals:
    """Sums at the captured sizes; `unknown` counts the nodes without a number, which the sums leave out."""
    total = Totals()
    for cost in costs:
        total.launches += cost.launches
        if cost.flops_value is None or cost.bytes_value is None or cost.roofline_us is None:
            total.unknown += 1
            continue
        total.flops += cost.flops_value
        total.bytes += cost.bytes_value
        total.roofline_ms += cost.roofline_us / 1e3
    return total
