"""`--operators custom`: nodes of the `tilewright` domain that a library of our own kernels serves.

Every semantic op that has a kernel for this machine's CPU becomes one node, named after the kernel: its
tensors are inputs, its numbers attributes. The library is built from the same generated text that torch
loads. What has no kernel keeps its standard form.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from tilewright.compiler.diagnostics import BuildError
from tilewright.compiler.ops import semantic_op
from tilewright.compiler.schema import arguments
from tilewright.frontends.export.artifact import Artifact
from tilewright.frontends.export.captured import Captured
from tilewright.frontends.export.onnx_graph import TILEWRIGHT, OnnxGraph
from tilewright.frontends.export.onnx_held import attend_to_held
from tilewright.kernels.common.onnx_library import Operator, library_sources
from tilewright.kernels.table import KernelChoice, candidates, host_target, select_for_node
from tilewright.runtime.build import LIBRARY, CompileFailed, compile_library
from tilewright.runtime.contracts import Refusal


class CustomOperators:
    """The kernels that one model calls, gathered while it is written."""

    def __init__(self) -> None:
        self.operators: dict[str, Operator] = {}
        self.refused: dict[str, str] = {}
        """Semantic op -> why a call of it kept its standard form."""
        self._sources: dict[str, str] = {}
        self._names: dict[Any, tuple[str, str]] = {}

    def attend_to_held(self, captured: Captured) -> None:
        """Have the attentions of a decode step over buffers stop at its position, where a kernel can."""
        named = {name: placeholder for placeholder, name in captured.names().items()}
        reasons = attend_to_held(captured.program, named["position_ids"])
        captured.program.module.recompile()
        if reasons:
            self.refused["paged_attention"] = "; ".join(reasons)

    def choice(self, node: fx.Node) -> KernelChoice | None:
        """The kernel for a call of a semantic op, None where there is none for it."""
        op = semantic_op(node.target)
        if op is None or not candidates(op.name):
            return None
        metas = list(fx.node.map_arg(tuple(arguments(node).values()), lambda n: n.meta["val"]))
        found = select_for_node(op.name, metas, host_target(), training=False)
        if isinstance(found, Refusal):
            self.refused[op.name] = found.reason
            return None
        if found.family.needs_torch(found.key):
            self.refused[op.name] = "the kernel computes with torch"
            return None
        given, _ = found.rewrite_args(tuple(arguments(node).values()))
        pairs = zip(_arguments(found), given, strict=True)
        if any(isinstance(value, fx.Node) != (kind == "tensor") for (kind, _), value in pairs):
            self.refused[op.name] = "a number that only the call knows"
            return None
        return found

    def write(self, g: OnnxGraph, node: fx.Node, choice: KernelChoice) -> str | list[str]:
        """Append the node; its result has the structure of the semantic op's."""
        if choice.key not in self._names:
            self._names[choice.key] = choice.family.source(choice.key)
        name, text = self._names[choice.key]
        given, _ = choice.rewrite_args(tuple(arguments(node).values()))
        inputs, attributes = list[str](), dict[str, Any]()
        for (kind, label), value in zip(_arguments(choice), given, strict=True):
            if kind == "tensor":
                inputs.append(g.name(value))
            else:
                attributes[label] = float(value) if kind == "float" else int(value)
        if name not in self.operators:
            tensors = [v.meta["val"] for v in given if isinstance(v, fx.Node)]
            outputs = _outputs(node)
            self.operators[name] = Operator(name, _arguments(choice), _dtypes(tensors), _dtypes(outputs))
            self._sources[name] = text
        made = g.node_many(name, inputs, len(self.operators[name].outputs), domain=TILEWRIGHT, **attributes)
        return made if isinstance(node.meta["val"], (list, tuple)) else made[0]

    def save(self, artifact: Artifact, name: str) -> None:
        """Build the library and put it into the artifact. BuildError when the compiler refuses."""
        rows = [self.operators[key] for key in sorted(self.operators)]
        sources, headers = library_sources(rows, self._sources)
        try:
            folder = compile_library(sources, host_target().arch, headers)
        except CompileFailed as error:
            raise BuildError(f"the operators of onnxruntime: {error}") from error
        shutil.copyfile(folder / LIBRARY, artifact.path(name))


def _arguments(choice: KernelChoice) -> tuple[tuple[str, str], ...]:
    """(kind, name) of each argument of the kernel op."""
    found = re.findall(r"(Tensor|int|float) (\w+)", choice.family.schema(choice.key).split("->")[0])
    return tuple((kind.lower(), name) for kind, name in found)


def _outputs(node: fx.Node) -> list[Tensor]:
    value = node.meta["val"]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _dtypes(tensors: Sequence[Tensor]) -> tuple[str, ...]:
    return tuple(str(t.dtype).removeprefix("torch.") for t in tensors)
