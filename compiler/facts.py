"""Facts of a program: what the user gives is checked, what the graph shows is derived."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from tilewright.compiler.blocks import BlockStructure, Layer, find_blocks
from tilewright.compiler.dataflow import Flow, op_name, tensor_of
from tilewright.compiler.diagnostics import FactError, nearest
from tilewright.compiler.program import InputKind, InputSpec, Program
from tilewright.compiler.step_input import step_embeddings
from tilewright.compiler.video_facts import find_grid

OBSERVED = ("device", "dtype", "dynamic_inputs")
"""Facts that are read off the program and cannot be given."""
_CLOCKS = ("timestep", "timesteps", "step", "t", "sigma", "time")


def derive_facts(program: Program) -> None:
    """Fill in what the graph shows. A fact that the user gave stays; one that cannot be told is left absent.

    `layers` (count), `blocks` (their names), `attention_layers` (attention node -> layer), `hidden_size`,
    `device`, `dtype`, `dynamic_inputs` (input -> symbolic axes), `video_grid` (T, Y, X in tokens),
    `text_segment` (start, length on the joint token axis), `step_input` (placeholder). `branch_input` is
    never derived: that a batch holds two guidance branches cannot be seen in a graph.
    """
    flow = Flow(program.graph)
    structure = find_blocks(program.graph, program.inputs, flow)
    _observe(program)
    _derive_layers(program, structure)
    _derive_grid(program, flow, structure)
    _derive_step_input(program, flow)
    program.facts.absent(
        "branch_input", "which calls or batch entries are guidance branches is not in the graph"
    )


def _observe(program: Program) -> None:
    """Device, weight dtype and symbolic input axes."""
    held = [t for t in program.example_inputs if isinstance(t, torch.Tensor)]
    devices = sorted({str(t.device) for t in held})
    if len(devices) == 1:
        program.facts.set("device", devices[0], "derived: all inputs lie there")
    else:
        program.facts.absent("device", f"the inputs lie on {', '.join(devices) or 'no device'}")
    weights = zip(program.inputs, program.example_inputs, strict=True)
    sizes: Counter[str] = Counter()
    for spec, value in weights:
        if spec.kind is InputKind.WEIGHT and isinstance(value, torch.Tensor) and value.is_floating_point():
            sizes[str(value.dtype).removeprefix("torch.")] += value.numel()
    if sizes:
        name, count = sizes.most_common(1)[0]
        share = f"{count} of {sum(sizes.values())} weight elements have it"
        program.facts.set("dtype", name, f"derived: {share}")
    else:
        program.facts.absent("dtype", "the program has no floating-point weights")
    dynamic: dict[str, tuple[int, ...]] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        tensor = tensor_of(node)
        axes = [i for i, n in enumerate(tensor.shape) if not isinstance(n, int)] if tensor is not None else []
        if axes:
            dynamic[node.name] = tuple(axes)
    program.facts.set("dynamic_inputs", dynamic, "derived: axes with symbolic sizes")


def _derive_layers(program: Program, structure: BlockStructure) -> None:
    """Layers along the residual streams, and what follows from them."""
    facts = program.facts
    if structure.refusal:
        for name in ("layers", "blocks", "attention_layers", "hidden_size"):
            facts.absent(name, structure.refusal)
        return
    layers = structure.layers
    counts = Counter(
        stream.index for layer in layers for stream in structure.streams if _runs_in(layer, stream.index)
    )
    described = ", ".join(f"{n} on stream {i}" for i, n in sorted(counts.items()))
    facts.set("layers", len(layers), f"derived: repeated blocks of the residual streams ({described})")
    names = tuple(block.name for block in structure.blocks)
    facts.set("blocks", names, "derived: repeated blocks in order of execution, coupled ones side by side")
    placed = {s.node.name: structure.layer_of(s.node) for s in structure.attentions}
    inside = {name: layer for name, layer in placed.items() if layer is not None}
    outside = f"; {len(placed) - len(inside)} outside the layers" if len(inside) < len(placed) else ""
    if inside:
        facts.set(
            "attention_layers",
            inside,
            f"derived: order along the residual stream, {_agreement(layers)}{outside}",
        )
    else:
        facts.absent("attention_layers", "no attention lies in a layer")
    main = structure.streams[counts.most_common(1)[0][0]]
    value = tensor_of(main.points[0])
    width = value.shape[-1] if value is not None else None
    if isinstance(width, int) and value is not None and value.dim() == 3:
        facts.set(
            "hidden_size", width, f"derived: width of residual stream {main.index} at {main.points[0].name}"
        )
    else:
        facts.absent(
            "hidden_size", f"residual stream {main.index} is not [batch, tokens, width] with static width"
        )


def _runs_in(layer: Layer, stream: int) -> bool:
    return any(block.stream == stream for block in layer.blocks)


def _agreement(layers: Iterable[Layer]) -> str:
    """Whether the numbers in the module paths count the layers of each container from 0."""
    expected: Counter[str] = Counter()
    for layer in layers:
        if not layer.path:
            return "no module paths to confirm it"
        container, _, number = layer.path.rpartition(".")
        if number != str(expected[container]):
            return (
                f"module paths number otherwise ({layer.path} is number {expected[container]} of {container})"
            )
        expected[container] += 1
    return "confirmed by module paths"


def _derive_grid(program: Program, flow: Flow, structure: BlockStructure) -> None:
    found = find_grid(flow, structure)
    if isinstance(found, str):
        program.facts.absent("video_grid", found)
        program.facts.absent("text_segment", "it is told from the video grid, which is absent")
        return
    program.facts.set("video_grid", found.grid, found.origin)
    if found.text is not None:
        program.facts.set("text_segment", found.text, found.text_origin)
    else:
        program.facts.absent("text_segment", "the attention over the grid holds no other tokens")


def _derive_step_input(program: Program, flow: Flow) -> None:
    """The argument that a sinusoidal embedding is computed from and that linears read it through."""
    arguments = {
        n: s for n in flow.nodes if (s := program.spec(n)) is not None and s.kind is not InputKind.WEIGHT
    }
    found: dict[fx.Node, fx.Node] = {}
    for embedding in step_embeddings(flow):
        if flow.below(embedding) & flow.heavy:
            found.update({n: embedding for n in arguments if flow.reaches(n, embedding)})
    clocks = [n for n in found if argument_name(arguments[n]) in _CLOCKS]
    chosen = list(found) if len(found) == 1 else clocks
    if len(chosen) == 1:
        why = "" if len(found) == 1 else f"; of {len(found)} such inputs the one with that name"
        place = f"derived: reaches the sinusoidal embedding {found[chosen[0]].name}{why}"
        program.facts.set("step_input", chosen[0].name, place)
    elif found:
        names = ", ".join(n.name for n in found)
        program.facts.absent("step_input", f"several inputs reach a sinusoidal embedding: {names}")
    else:
        program.facts.absent("step_input", "no input reaches a sinusoidal embedding")


def argument_name(spec: InputSpec) -> str:
    """An input's name as the user wrote it: `l_timestep_` of a Dynamo capture is `timestep`."""
    if spec.source:
        return spec.source.rpartition(".")[2]
    name = spec.name
    return name[2:-1] if name.startswith("l_") and name.endswith("_") else name


def apply_user_facts(program: Program, mapping: Mapping[str, Any]) -> None:
    """Record facts that the user gives, after checking name, form and that they fit the program.

    Raises FactError that names the fact, the value and the legal form.
    """
    for name, value in mapping.items():
        if name in OBSERVED:
            raise FactError(
                f"fact {name!r} is read off the program and cannot be given", remedy="leave it out"
            )
        if name not in _CHECKS:
            raise FactError(f"unknown fact {name!r}", remedy=nearest(str(name), _CHECKS))
        form, check = _CHECKS[name]
        checked = check(program, value)
        if isinstance(checked, _Fault):
            raise FactError(f"fact {name} = {value!r}: {checked.reason}", remedy=f"expected {form}")
        program.facts.set(name, checked, "user")


class _Fault:
    """Why a given fact is not legal."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _count(_: Program, value: Any) -> Any:
    return value if _whole(value, 1) else _Fault("not a positive whole number")


def _numbers(value: Any, count: int) -> list[Any] | None:
    if isinstance(value, str):
        parts = value.lower().split("x")
        value = [int(p) for p in parts] if all(p.isdecimal() for p in parts) else []
    return list(value) if isinstance(value, (list, tuple)) and len(value) == count else None


def _grid(program: Program, value: Any) -> Any:
    numbers = _numbers(value, 3)
    if numbers is None or not all(_whole(n, 1) for n in numbers):
        return _Fault("not three positive whole numbers")
    tokens, longest = numbers[0] * numbers[1] * numbers[2], _longest_attention(program)
    if longest is not None and tokens > longest:
        return _Fault(f"{tokens} tokens, but the longest attention has {longest}")
    return tuple(numbers)


def _text(program: Program, value: Any) -> Any:
    numbers = _numbers(value, 2)
    if numbers is None or not _whole(numbers[0], 0) or not _whole(numbers[1], 1):
        return _Fault("not a start and a length")
    longest = _longest_attention(program)
    if longest is not None and sum(numbers) > longest:
        return _Fault(f"it ends at {sum(numbers)}, but the longest attention has {longest} tokens")
    return tuple(numbers)


def _longest_attention(program: Program) -> int | None:
    """Most queries of any attention, None when there is none or a length is symbolic."""
    lengths: list[int] = []
    for node in program.graph.nodes:
        if op_name(node) in ("attention", "scaled_dot_product_attention"):
            out = tensor_of(node)
            if out is None or not isinstance(out.shape[-2], int):
                return None
            lengths.append(out.shape[-2])
    return max(lengths, default=None)


def _layer_map(program: Program, value: Any) -> Any:
    if not isinstance(value, Mapping) or not value:
        return _Fault("not a mapping")
    known = {node.name for node in program.graph.nodes if node.op == "call_function"}
    for node, layer in value.items():
        if node not in known:
            return _Fault(f"the program has no node {node!r}; {nearest(str(node), known)}")
        if not _whole(layer, 0):
            return _Fault(f"layer {layer!r} of {node} is not a whole number from 0")
    return dict(value)


def _names(_: Program, value: Any) -> Any:
    fits = isinstance(value, (list, tuple)) and value and all(isinstance(v, str) and v for v in value)
    return tuple(value) if fits else _Fault("not a list of names")


def _argument(program: Program, value: Any) -> Any:
    """The placeholder of a call argument, given by its own name or by the user's."""
    if not isinstance(value, str):
        return _Fault("not a name")
    arguments = [spec for spec in program.inputs if spec.kind is not InputKind.WEIGHT]
    for spec in arguments:
        if value in (spec.name, spec.source, argument_name(spec)):
            return spec.name
    return _Fault(f"no such input; {nearest(value, [argument_name(s) for s in arguments])}")


_CHECKS: dict[str, tuple[str, Callable[[Program, Any], Any]]] = {
    "layers": ("a whole number from 1", _count),
    "hidden_size": ("a whole number from 1", _count),
    "blocks": ("a list of block names", _names),
    "attention_layers": ("a mapping of attention node names to layer numbers", _layer_map),
    "video_grid": ("[T, Y, X] or 'TxYxX' in tokens", _grid),
    "text_segment": ("[start, length] in tokens", _text),
    "step_input": ("the name of an input", _argument),
    "branch_input": ("the name of an input", _argument),
}
