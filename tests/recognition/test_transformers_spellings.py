"""Attention as transformers writes it, eager and fused: recognised in every layer, by the real capture."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tilewright.compiler.ops import semantic_op
from tilewright.frontends.capture import from_dynamo, normalize
from tilewright.tools.zoo_models import select

QUICK = ("llama", "llama-eager", "gemma2-eager", "gpt-oss")
"""Fused with a mask; spelled out; with softcap; with sinks."""
ALL = (
    "llama-padded",
    "gpt2-eager",
    "gptj",
    "codegen",
    "gpt-neo",
    "bloom",
    "mpt",
    "falcon",
    "xglm",
    "bert-eager",
)
ALL += ("mpnet", "deberta-v2", "vit-eager", "swinv2", "siglip", "t5", "whisper", "wan", "cogvideox", "ltx")


def recognised(entry):
    """Semantic ops of one call by name, over all graphs of a model."""
    found = Counter()

    def backend(gm, inputs):
        program = from_dynamo(gm, inputs)
        normalize(program)
        ops = (semantic_op(n.target) for n in program.graph.nodes)
        found.update(op.name for op in ops if op is not None)
        return gm.forward

    torch._dynamo.reset()
    args, kwargs = entry.inputs()
    with torch.no_grad():
        torch.compile(entry.build(), backend=backend)(*args, **kwargs)
    return found


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in ALL)])
def test_every_attention_is_recognised(name):
    (entry,) = select([name])
    found = recognised(entry)
    assert {op: found[op] for op in entry.expected} == dict(entry.expected)
