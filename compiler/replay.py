"""Translation validation: each applied rewrite is run against what it replaced, on random inputs.

Regions that are the same up to renaming are replayed once. What is too large to run cheaply is said so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tilewright.compiler import parity
from tilewright.compiler.diagnostics import VerifyError
from tilewright.compiler.match import Match
from tilewright.compiler.program import Program
from tilewright.compiler.schema import arguments, op_name, tensor_meta
from tilewright.compiler.stage import Exactness

MAX_ELEMENTS = 1 << 22
"""Regions with more input or intermediate elements than this are not replayed."""


def tolerance(exactness: Exactness, dtype: torch.dtype) -> float:
    """Relative RMS difference allowed between a region and its replacement."""
    if exactness is Exactness.BITWISE or not dtype.is_floating_point:
        return 0.0
    return 16 * torch.finfo(dtype).eps


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """`parity.relative_rms` between results that must also agree in dtype; infinite where they do not."""
    return parity.relative_rms(got, want) if got.dtype == want.dtype else float("inf")


class Replayer:
    """Replays applications of one pass; remembers the regions it has seen."""

    def __init__(self, name: str, exactness: Exactness, seed: int = 0) -> None:
        self._name = name
        self._exactness = exactness
        self._seed = seed
        self._seen: dict[Any, float] = {}

    def __call__(
        self, program: Program, m: Match, after: fx.GraphModule, inputs: list[fx.Node], key: Any
    ) -> tuple[float | None, str]:
        if self._exactness is Exactness.APPROXIMATE:
            return None, "approximate: measured on the model, not on random inputs"
        elements = sum(_elements(n) for n in {*inputs, *m.nodes})
        if elements > MAX_ELEMENTS:
            return None, f"{elements} elements, more than {MAX_ELEMENTS}"
        region = extract(m, inputs)
        signature = (key, str(region))
        if signature not in self._seen:
            before = fx.GraphModule(program.module, region)
            self._seen[signature] = self._run(before, after, m, inputs)
        return self._seen[signature], ""

    def _run(self, before: fx.GraphModule, after: fx.GraphModule, m: Match, inputs: list[fx.Node]) -> float:
        generator = torch.Generator().manual_seed(self._seed)
        made: dict[fx.Node, Any] = {}
        for node in inputs:
            made.setdefault(node, _in_range(node, m, random_like(node.meta["val"], generator)))
        values = [made[n] for n in inputs]
        with torch.no_grad():
            want = tensors_in(before(*values))
            got = tensors_in(after(*values))
        worst = 0.0
        for g, w in zip(got, want, strict=True):
            error = relative_rms(g, w)
            if error > tolerance(self._exactness, w.dtype):
                raise VerifyError(
                    f"{self._name} (form {m.form!r}) is wrong at {m.root.name}: the replacement differs by "
                    f"{error:.3g} relative RMS, at most {tolerance(self._exactness, w.dtype):.3g} is allowed",
                    remedy=f"drop {self._name} from the pipeline and report the pass",
                )
            worst = max(worst, error)
        return worst


_INDEXED = {"embedding": ("weight", "indices", 0), "index_select": ("self", "index", "dim")}
"""Ops that read rows by index: the table, the indices and the axis they count over, by argument name."""


def _in_range(node: fx.Node, m: Match, value: Any) -> Any:
    """Counting integers folded into the number of rows of the tables that the match looks them up in."""
    for user in node.users:
        names = _INDEXED.get(op_name(user).rsplit(":", 1)[-1])
        given = arguments(user) if names and user in m.nodes else {}
        if names and given.get(str(names[1])) is node and isinstance(value, torch.Tensor):
            table = tensor_meta(given[str(names[0])])
            axis = names[2] if isinstance(names[2], int) else given[str(names[2])]
            value = value % hint(table.shape[axis]) if table is not None else value
    return value


def _elements(node: fx.Node) -> int:
    meta = node.meta.get("val")
    return hint(meta.numel()) if isinstance(meta, torch.Tensor) else 0


def hint(size: Any) -> int:
    """A size as an int; a symbolic one by the value seen at capture."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint if size.node.hint is not None else 8)
    return int(size)


def random_like(meta: Any, generator: torch.Generator) -> Any:
    """A real value shaped like a fake one: normal floats, counting integers, mostly-True masks."""
    if not isinstance(meta, torch.Tensor):
        return hint(meta) if isinstance(meta, (int, torch.SymInt)) else meta
    shape = [hint(s) for s in meta.shape]
    if meta.dtype == torch.bool:
        mask = torch.rand(shape, generator=generator) > 0.3
        if mask.dim() and mask.shape[-1]:
            mask[..., 0] = True
        return mask
    if meta.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex64).mul_(1.5).to(meta.dtype)
    if meta.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(1.5).to(meta.dtype)
    count = 1
    for s in shape:
        count *= s
    return torch.arange(count, dtype=meta.dtype).reshape(shape)


def extract(m: Match, inputs: Sequence[fx.Node]) -> fx.Graph:
    """The matched region as a graph of its own, its nodes named by position; one placeholder per input."""
    graph = fx.Graph()
    done: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(inputs):
        placeholder = graph.placeholder(f"a{i}")
        done.setdefault(node, placeholder)
    for i, node in enumerate(sorted(m.nodes)):
        if node not in done:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: done[n])
            done[node] = graph.create_node(node.op, node.target, args, kwargs, f"v{i}")
    graph.output(tuple(done[o] for o in m.outputs))
    return graph


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of a nested result, in order."""
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
