"""What rules that choose tokens keep of the attention of a real model's last query, at one budget.

The policies of the cache choose by their own code; oracles and rules without a policy are written out here.
A few prompts, one position of each: rules beside each other, not a measure of quality.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.compiler import ops
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.loaded_model import LoadedModel
from tilewright.passes.memory._evictions import most
from tilewright.passes.memory.lessismore_kv import LessIsMoreKV
from tilewright.passes.memory.quest_kv import QuestKV
from tilewright.passes.memory.snap_kv import SnapKV
from tilewright.passes.memory.streaming_kv import StreamingKV

PROMPTS = ("heapq", "textwrap", "tokenize")
"""Modules of Python's own library: the first LENGTH tokens of their sources."""
LENGTH, BUDGET, PAGE, CHUNK, OBSERVED = 1024, 128, 16, 8, 32
_NAME = "tilewright_watched"


@dataclass(frozen=True)
class Attention:
    """One layer over a whole prompt: q [H, S, D], k and v [Hkv, S, D], after position embedding."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.q.shape[0] // self.k.shape[0]

    def logits(self, queries: int = 1) -> Tensor:
        """float32 [H, queries, S] of the last queries; -inf for keys behind them."""
        keys = self.k.repeat_interleave(self.group, 0)
        found = self.scale * self.q[:, -queries:] @ keys.transpose(1, 2)
        size = keys.shape[1]
        place = torch.arange(size - queries, size)[:, None]
        return found.masked_fill(torch.arange(size) > place, float("-inf"))

    def kept(self, mask: Tensor) -> tuple[float, float]:
        """(share of the probabilities, relative error of the output) of the last query under bool [H, S]."""
        logits, values = self.logits()[:, 0], self.v.repeat_interleave(self.group, 0)
        shares = logits.softmax(-1)
        dense = (shares[:, None] @ values)[:, 0]
        own = (logits.masked_fill(~mask, float("-inf")).softmax(-1)[:, None] @ values)[:, 0]
        mass = (shares * mask).sum(-1).mean()
        return float(mass), float((own - dense).norm() / dense.norm())


Rule = Callable[[list[Attention], int], Tensor | None]
"""rule(layers, index) -> bool [H, S] or [Hkv, S] of the tokens kept; None where the rule keeps all."""


def _where(positions: Tensor, size: int) -> Tensor:
    """bool [heads, size] of positions [heads, m], -1 for none."""
    kept = torch.zeros(positions.shape[0], size + 1, dtype=torch.bool)
    return kept.scatter(1, positions.long() % (size + 1), True)[:, :size]


def _oracle(layers: list[Attention], index: int, *, grouped: bool) -> Tensor:
    layer = layers[index]
    shares = layer.logits()[:, 0].softmax(-1)
    if grouped:
        shares = shares.unflatten(0, (-1, layer.group)).sum(1)
    return _where(shares.topk(BUDGET).indices, shares.shape[1])


def _less_is_more(layers: list[Attention], index: int, *, reuse: bool) -> Tensor | None:
    policy = LessIsMoreKV(budget=BUDGET, select_layers=(2, 14))
    before = [c for c in policy.choosing(len(layers)) if c < index]
    if reuse and (not before or index in policy.select_layers):
        return None
    layer = layers[before[-1] if reuse else index]
    logits = layer.logits()[None, :, 0]
    chosen = policy.positions(logits, torch.tensor([logits.shape[2]]), None)[0]
    return _where(chosen, logits.shape[2]).expand(layer.k.shape[0], -1)


def _snap(layers: list[Attention], index: int) -> Tensor:
    layer, policy = layers[index], SnapKV(budget=BUDGET, window=OBSERVED, kernel=5, dense_layers=0)
    mass, size = layer.logits(OBSERVED).softmax(-1).sum(1)[None], layer.k.shape[1]
    worth = policy.worth(mass, layer.k.shape[0], torch.tensor([size]), None)
    at = torch.arange(size).expand_as(worth)
    return _where(most(worth, at, BUDGET)[0], size)


def _quest(layers: list[Attention], index: int, *, grouped: bool) -> Tensor:
    layer, policy = layers[index], QuestKV(budget=BUDGET, page=PAGE, sink_page=False, dense_layers=0)
    keys = layer.k if grouped else layer.k.repeat_interleave(layer.group, 0)
    pages = keys.unflatten(1, (-1, PAGE)).transpose(0, 1)
    table, lengths = torch.arange(len(pages), dtype=torch.int32)[None], torch.tensor([keys.shape[1]])
    query = layer.q[None, :, -1:]
    bounds = ops.page_bounds(query, pages.amin(2), pages.amax(2), table, lengths, PAGE)
    return _where(policy.picked(bounds, lengths, None)[0], len(pages)).repeat_interleave(PAGE, 1)


def _landmarks(layers: list[Attention], index: int, *, shadow: bool) -> Tensor:
    """Chunks by the means of their keys; shadow: the newest tokens and the chunks that a mean misrepresents
    besides."""
    layer = layers[index]
    size, local = layer.k.shape[1], OBSERVED if shadow else 0
    chunks = layer.k[:, : size - local].unflatten(1, (-1, CHUNK))
    means = chunks.mean(2)
    p = (layer.scale * layer.q[:, -1:] @ means.repeat_interleave(layer.group, 0).transpose(1, 2))[:, 0]
    outliers, count = torch.zeros(means.shape[:2], dtype=torch.bool), BUDGET // CHUNK
    if shadow:
        worst = F.cosine_similarity(chunks, means[:, :, None], dim=-1).amin(2)
        outliers = _where((-worst).topk(2).indices, means.shape[1])
        count = (BUDGET - local) // CHUNK - 2
    p = p.masked_fill(outliers.repeat_interleave(layer.group, 0), float("-inf")).softmax(-1)
    best = p.unflatten(0, (-1, layer.group)).amax(1).topk(count).indices
    kept = (_where(best, means.shape[1]) | outliers).repeat_interleave(CHUNK, 1)
    return F.pad(kept, (0, local), value=True)


def _streaming(layers: list[Attention], index: int) -> Tensor:
    layer, policy = layers[index], StreamingKV(sinks=4, window=BUDGET - 4)
    at = torch.arange(layer.k.shape[1])
    kept = (at < policy.sinks) | (at >= len(at) - policy.window)
    return kept.expand(layer.k.shape[0], -1)


def _named(rule: Callable[..., Any], **how: Any) -> Rule:
    return lambda layers, index: rule(layers, index, **how)


RULES: dict[str, tuple[Rule, float]] = {
    "oracle per query head": (_named(_oracle, grouped=False), 0.945),
    "oracle per key head": (_named(_oracle, grouped=True), 0.935),
    "lessismore-kv, reused": (_named(_less_is_more, reuse=True), 0.916),
    "lessismore-kv, own": (_named(_less_is_more, reuse=False), 0.913),
    "snap-kv 32 + 96": (_snap, 0.876),
    "shadow 32 + 2 + 10 chunks": (_named(_landmarks, shadow=True), 0.861),
    "quest-kv per query head": (_named(_quest, grouped=False), 0.861),
    "quest-kv": (_named(_quest, grouped=True), 0.854),
    "means of chunks alone": (_named(_landmarks, shadow=False), 0.710),
    "streaming-kv 4 + 124": (_streaming, 0.690),
}
"""Name -> (rule, the share of the probabilities that was measured for it on another prompt)."""


@dataclass(frozen=True)
class SelectorRow:
    """One rule: means over the prompts, and over the layers that it changes."""

    rule: str
    mass: float
    """Share of the last query's probabilities, mean over heads and layers."""
    least: float
    """Of the layer that keeps least."""
    error: float
    """Relative error of the attention's output."""
    layers: int
    expected: float
    """`mass` on the prompt that the order was published for."""


def watched(model: Any, tokens: Tensor) -> list[Attention]:
    """What every attention of one forward over tokens [1, S] reads."""
    from transformers import AttentionInterface

    layers: list[Attention] = []

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **how: Any) -> tuple[Tensor, None]:
        layers.append(Attention(q[0], k[0], v[0], float(how["scaling"])))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=how["scaling"], enable_gqa=k.shape[1] != q.shape[1]
        )
        return out.transpose(1, 2), None

    AttentionInterface.register(_NAME, attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        with torch.no_grad():
            model(tokens, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return layers


def source_prompts(model: LoadedModel) -> list[Tensor]:
    """int64 [1, LENGTH] each: source code that every Python has."""
    if model.tokenizer is None:
        raise OptionError(f"{model.name} has no tokenizer", remedy="evaluate a language model that has one")
    texts = [inspect.getsource(importlib.import_module(name)) for name in PROMPTS]
    return [model.tokenizer(text, return_tensors="pt")["input_ids"][:, :LENGTH] for text in texts]


def selector_rows(model: LoadedModel) -> list[SelectorRow]:
    """Every rule on the model's own attention, in the published order.

    OptionError without a tokenizer, or for a model of fewer than 16 layers.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in RULES}
    for tokens in source_prompts(model):
        layers = watched(model.module, tokens)
        if len(layers) < 16:
            raise OptionError(
                f"{model.name} has {len(layers)} attentions: the rules reuse those of layers 2 and 14"
            )
        for name, (rule, _) in RULES.items():
            found[name] += [kept for kept in (_one(rule, layers, i) for i in range(len(layers))) if kept]
    rows = []
    for name, (_, expected) in RULES.items():
        masses, errors = zip(*found[name], strict=True)
        count = len(masses)
        mass, error = sum(masses) / count, sum(errors) / count
        rows.append(SelectorRow(name, mass, min(masses), error, count // len(PROMPTS), expected))
    return rows


def _one(rule: Rule, layers: list[Attention], index: int) -> tuple[float, float] | None:
    kept = rule(layers, index)
    if kept is None:
        return None
    return layers[index].kept(kept.repeat_interleave(layers[index].q.shape[0] // kept.shape[0], 0))
