"""Sinusoidal embeddings of scalars: how a denoising step enters a graph."""

from __future__ import annotations

from torch import fx

from tilewright.compiler.dataflow import Flow, op_name, see_through


def step_embeddings(flow: Flow) -> list[fx.Node]:
    """The nodes that join the sine and the cosine of one value into one vector.

    A rotary embedding takes both too, but multiplies with them and never joins them.
    """
    return [
        node for node in flow.members(flow.live) if op_name(node) == "cat" and _joins_sine_and_cosine(node)
    ]


def _joins_sine_and_cosine(cat: fx.Node) -> bool:
    parts = cat.args[0] if cat.args else ()
    if not isinstance(parts, (list, tuple)):
        return False
    waves = [see_through(part) for part in parts if isinstance(part, fx.Node)]
    sines = {wave.all_input_nodes[0] for wave in waves if op_name(wave) == "sin"}
    return any(op_name(wave) == "cos" and wave.all_input_nodes[0] in sines for wave in waves)


def step_masks(flow: Flow) -> tuple[int, int]:
    """Masks of all that depends on a step embedding, itself included, and of all it is computed from."""
    after, before = 0, 0
    for node in step_embeddings(flow):
        after |= flow.below(node) | flow.bit(node)
        before |= flow.upto(node)
    return after, before
