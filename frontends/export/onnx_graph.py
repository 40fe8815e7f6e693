"""An ONNX graph while it is being written: nodes, constants held once, weights named for external data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from onnx import FunctionProto, NodeProto, TensorProto, helper
from torch import Tensor, fx

from tilewright.compiler.program import Program

OPSET, IR_VERSION = 23, 11
MICROSOFT, TILEWRIGHT = "com.microsoft", "tilewright"
INLINE_BYTES = 1024
"""A constant up to this size stays in the model file."""

ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}

Operand = Any
"""An argument of a graph node: a node, a number, None, or a list of these."""


class Unsupported(Exception):
    """One node cannot be written; the walk gathers these and reports all at once."""


class OnnxGraph:
    """Collects the nodes of one model. Value names come from graph node names, which are identifiers."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, Tensor] = {}
        """Initializers by name, small and large."""
        self.values: dict[fx.Node, Any] = {}
        """Name of what a graph node computes, or a list of names."""
        self.domains: set[str] = set()
        self.functions: dict[str, FunctionProto] = {}
        self.tables: dict[Any, Any] = {}
        """What converters have worked out once for several nodes, by their own keys."""
        self.sizes: dict[str, tuple[int, ...]] = {}
        """Shapes of values that no graph node has, where they are known."""
        self.normed_sums: set[str] = set()
        """Sums of two values of one shape, of 2 or 3 axes, that are first read by their norm."""
        self.held_steps: dict[fx.Node, Any] = {}
        """Attentions that are written together with the rows that go into their buffers."""
        self._constants: dict[Any, str] = {}
        self._taken: set[str] = set()
        self._hint = "value"

    def at(self, node: fx.Node) -> None:
        """New values are named after this node from now on."""
        self._hint = node.name

    def fresh(self, hint: str | None = None) -> str:
        """A name that no value has."""
        name, number = hint or self._hint, 0
        while name in self._taken:
            number += 1
            name = f"{hint or self._hint}.{number}"
        self._taken.add(name)
        return name

    def node(
        self, op: str, inputs: Sequence[str], *, domain: str = "", name: str | None = None, **attributes: Any
    ) -> str:
        """Append a node with one output; returns that value's name. An input "" is absent."""
        return self.node_many(op, inputs, 1, domain=domain, names=[name] if name else None, **attributes)[0]

    def node_many(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: int,
        *,
        domain: str = "",
        names: Sequence[str] | None = None,
        **attributes: Any,
    ) -> list[str]:
        """Append a node with several outputs; returns their names."""
        made = [self.fresh(names[i] if names else None) for i in range(outputs)]
        given = list(inputs)
        while given and given[-1] == "":
            given.pop()
        self.nodes.append(helper.make_node(op, given, made, name=made[0], domain=domain, **attributes))
        if domain:
            self.domains.add(domain)
        return made

    def shared(self, key: Any, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node that is written once for equal `key`, wherever it is asked for again."""
        full = ("node", op, key, tuple(inputs))
        if full not in self._constants:
            self._constants[full] = self.node(op, inputs, **attributes)
        return self._constants[full]

    def constant(self, value: Any, dtype: torch.dtype) -> str:
        """A small constant (number, nested list or tensor), written once for equal bytes."""
        tensor = value.to(dtype) if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)
        key = (dtype, tuple(tensor.shape), tensor_bytes(tensor))
        if key not in self._constants:
            self._constants[key] = self.fresh("constant")
            self.weights[self._constants[key]] = tensor
        return self._constants[key]

    def weight(self, tensor: Tensor, name: str) -> str:
        """An initializer of any size under a free name like `name`."""
        made = self.fresh(name)
        self.weights[made] = tensor
        return made

    def held(self, key: Any, name: str, make: Any) -> str:
        """A weight computed by `make()` once for equal `key`."""
        full = ("weight", key)
        if full not in self._constants:
            self._constants[full] = self.weight(make(), name)
        return self._constants[full]

    def name(self, value: Operand) -> str:
        """The value name of a graph node with one result; a weight becomes an initializer on first use."""
        assert isinstance(value, fx.Node), f"{value!r} is not a node"
        if value not in self.values and (self.program.is_constant(value) or value.op == "get_attr"):
            self.values[value] = self.weight(self.tensor(value), self.program.path_of(value))
        found = self.values[value]
        assert isinstance(found, str), f"{value} has several results"
        return found

    def tensor(self, value: fx.Node) -> Tensor:
        """The real tensor of a weight, a derived buffer or a constant of the program."""
        if value.op == "get_attr":
            return self.program.module.get_buffer(str(value.target))
        return self.program.tensor_of(value)

    def is_held(self, value: Operand) -> bool:
        """True for a node whose tensor is known now."""
        return isinstance(value, fx.Node) and (self.program.is_constant(value) or value.op == "get_attr")

    def operand(self, value: Operand, dtype: torch.dtype) -> str:
        """A node's value cast to `dtype` where it has another one, or a number as a constant of it."""
        if not isinstance(value, fx.Node):
            return self.constant(value, dtype)
        return self.cast(self.name(value), dtype_of(value), dtype)

    def cast(self, name: str, given: torch.dtype, wanted: torch.dtype) -> str:
        """The value in another dtype; itself where it has it already."""
        if given == wanted:
            return name
        return self.shared(wanted, "Cast", [name], to=onnx_type(wanted))

    def ints(self, values: Sequence[Operand]) -> str:
        """An int64 vector of numbers and of sizes that are known at run time."""
        if all(isinstance(v, int) for v in values):
            return self.constant(list(values), torch.int64)
        axis = self.constant([0], torch.int64)
        parts = [
            self.constant([v], torch.int64)
            if isinstance(v, int)
            else self.shared(0, "Unsqueeze", [self.operand(v, torch.int64), axis])
            for v in values
        ]
        return parts[0] if len(parts) == 1 else self.node("Concat", parts, axis=0)


def onnx_type(dtype: torch.dtype) -> int:
    """The ONNX element type; Unsupported for a dtype that has none here."""
    if dtype not in ONNX_TYPES:
        raise Unsupported(f"dtype {dtype} has no ONNX type")
    return int(ONNX_TYPES[dtype])


def dtype_of(value: Operand) -> torch.dtype:
    """The dtype of a node's value; sizes are int64, symbolic numbers float32."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else value
    if isinstance(found, Tensor):
        return found.dtype
    if isinstance(found, (bool, torch.SymBool)):
        return torch.bool
    return torch.int64 if isinstance(found, (int, torch.SymInt)) else torch.float32


def shape_of(node: Operand) -> list[Any]:
    """Sizes of a node's value: ints, or SymInts."""
    return list(node.meta["val"].shape)


def rank_of(node: Operand) -> int:
    """Number of axes of a node's value."""
    return len(shape_of(node))


def tensor_bytes(tensor: Tensor) -> bytes:
    """The elements in row-major order, little endian, as ONNX raw data has them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and elements."""
    found = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def place(node: fx.Node) -> str:
    """File and line of a node in the user's source, for errors."""
    trace = str(node.meta.get("stack_trace", "")).strip().splitlines()
    files = [line.strip() for line in trace if line.strip().startswith("File ")]
    found = re.match(r'File "(.*)", line (\d+)', files[-1]) if files else None
    return f"{found[1]}:{found[2]}" if found else "unknown line"
