"""`tilewright.prefix_cache`: prompts computed once, for the requests that begin with the same tokens.

A text that every request begins with is computed ahead (CAG, arXiv:2412.15605), or the documents of requests
stay in a tree and give way by what computing them anew would cost (RAGCache, arXiv:2404.12457). Only whole
pages are kept, under the very tokens that led to them, so that what a request gets is what it would compute.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.export.captured import describe_model
from tilewright.frontends.kv_cache import PagedCache, kv_cache
from tilewright.frontends.kv_prefill import prefill
from tilewright.frontends.kv_relay import RelayLayer
from tilewright.runtime.kv_store.pool import PagePool
from tilewright.runtime.kv_store.prefix_tree import Cost, Lease, Pages, PrefixTree
from tilewright.runtime.kv_store.snapshot import SnapshotError, load_snapshot, save_snapshot


def fingerprint(model: Any) -> str:
    """SHA-256 of a model's configuration and weights."""
    weights = describe_model("", dict(model.named_parameters()))["fingerprint"]
    config = json.dumps(model.config.to_diff_dict(), sort_keys=True, default=str)
    return hashlib.sha256(f"{weights} {config}".encode()).hexdigest()


def operations(model: Any) -> Cost:
    """What tokens cost by the model's sizes: products with its weights, and with the keys before them."""
    config = model.config.get_text_config(decoder=True)
    embedding = model.get_input_embeddings().weight
    weights = sum(p.numel() for p in model.base_model.parameters() if p is not embedding)
    return lambda cached, new: (
        2.0 * new * (weights + 2 * config.num_hidden_layers * config.hidden_size * (cached + new / 2))
    )


class PrefixCache:
    """Made by `prefix_cache`: tokens of one model in a tree of the prompts that they were in."""

    def __init__(
        self, model: Any, capacity: int, page: int, pipeline: Any, cost: Cost | None, chunk: int
    ) -> None:
        self._model, self._pipeline, self.page, self.chunk = model, pipeline, page, chunk
        with self._empty() as cache:
            self._layers = len(cache.layers)
        self._pools: list[PagePool] = []
        self.tree = PrefixTree(page, capacity, cost or operations(model), self._drop)
        self._versions = self._state()
        self.found = self.computed = 0
        """Tokens of requests that were held, and that were not."""

    def _empty(self) -> PagedCache:
        cache = kv_cache(self._model, self._pipeline, self.page)
        if not all(isinstance(layer, RelayLayer) for layer in cache.layers):
            cache.close()
            raise OptionError(f"pipeline = {self._pipeline}: a prefix cache follows relay-attention alone")
        return cache

    def _state(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self._model.parameters()]

    def _check(self) -> None:
        if self._state() != self._versions:
            raise OptionError(
                "the model's weights changed since this prefix cache was made: what it holds is not theirs",
                remedy="make another one",
            )

    def add(self, tokens: Sequence[int] | Tensor) -> int:
        """Compute what is not held of a prompt and keep its whole pages; how many of its tokens are held now.

        Fewer than its whole pages where requests in flight hold too much of the capacity.
        """
        self._check()
        ids = _ids(tokens)
        lease = self.tree.match(ids)
        try:
            self._extend(lease, ids)
            return len(lease.pages) * self.page
        finally:
            self.tree.release(lease)

    def begin(self, sequences: Sequence[Sequence[int] | Tensor], keep: bool = False) -> dict[str, Any]:
        """What `model.generate(**begun)` takes: input_ids and attention_mask, int64 [B, S], and a cache that
        holds what is known of every prompt.

        sequences: the tokens of each prompt, 1 or more. keep: compute and keep their whole pages first; else
        what is not held is computed by the call alone. A row is the tokens that are held, a gap up to the
        longest of these, padding on the left, and the other tokens. Close the cache when the request is over.
        """
        self._check()
        prompts = [_ids(sequence) for sequence in sequences]
        if not prompts:
            raise OptionError("sequences is empty; expected 1 prompt or more")
        leases: list[Lease] = []
        try:
            for ids in prompts:
                leases.append(self.tree.match(ids[:-1]))  # the last one gives the logits
                if keep:
                    self._extend(leases[-1], ids[:-1])
            cache = self._attached([lease.pages for lease in leases])
        except BaseException:
            self._over(leases)
            raise
        held = [len(lease.pages) * self.page for lease in leases]
        self.found += sum(held)
        self.computed += sum(map(len, prompts)) - sum(held)
        cache.on_reset = partial(self._over, leases)
        return {**_rows(prompts, held, self._padding()), "past_key_values": cache}

    def _over(self, leases: list[Lease]) -> None:
        for lease in leases:
            self.tree.release(lease)

    def clear(self) -> None:
        """Give up everything. KVStoreError while a request is in flight."""
        self.tree.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that are held, those of requests in flight included."""
        return sum(pool.used * pool.page_bytes for pool in self._pools)

    def save(self, folder: str | Path, tokenizer: str, overwrite: bool = False) -> None:
        """Write everything to a snapshot. tokenizer: its fingerprint, any text. SnapshotError as
        `save_snapshot`."""
        self._check()
        nodes = list(self.tree.nodes())
        order = {node: i for i, node in enumerate(nodes)}
        tensors: dict[str, Tensor] = {}
        for layer, pool in enumerate(self._pools):
            at = torch.tensor([page[layer] for node in nodes for page in node.pages], dtype=torch.int64)
            at = at.to(pool.k_pages.device)
            tensors |= {f"k.{layer}": pool.k_pages[at], f"v.{layer}": pool.v_pages[at]}
        runs = [{"parent": order.get(n.parent, -1), "tokens": list(n.tokens)} for n in nodes]  # type: ignore[arg-type]
        metadata = {"page": self.page, "runs": runs}
        save_snapshot(
            Path(folder), tensors, metadata, model=fingerprint(self._model), tokenizer=tokenizer,
            overwrite=overwrite,
        )  # fmt: skip

    def load(self, folder: str | Path, tokenizer: str) -> int:
        """Add what a snapshot holds, as if computed now; the tokens held. SnapshotError where it is of
        another model, tokenizer or page, or does not fit."""
        self._check()
        found = load_snapshot(Path(folder), model=fingerprint(self._model), tokenizer=tokenizer)
        if found.metadata.get("page") != self.page:
            raise SnapshotError(f"the snapshot has pages of {found.metadata.get('page')}, not {self.page}")
        prompts: list[list[int]] = []
        at = 0
        for run in found.metadata["runs"]:
            before = prompts[run["parent"]] if run["parent"] >= 0 else []
            prompts.append(before + run["tokens"])
            count = len(run["tokens"]) // self.page
            lease = self.tree.match(prompts[-1])
            try:
                if len(lease.pages) * self.page == len(before):
                    pages = self._stored(found.tensors, range(at, at + count))
                    if not self.tree.add(lease, run["tokens"], pages):
                        self._drop(pages)
            finally:
                self.tree.release(lease)
            at += count
        return self.tree.tokens

    def _stored(self, tensors: dict[str, Tensor], at: range) -> list[Pages]:
        """New pages with the contents of those of a snapshot."""
        self._make_pools([(tensors[f"k.{i}"], tensors[f"v.{i}"]) for i in range(self._layers)])
        columns = []
        for layer, pool in enumerate(self._pools):
            numbers = [pool.allocate() for _ in at]
            pool.k_pages[numbers] = tensors[f"k.{layer}"][at.start : at.stop].to(pool.k_pages.device)
            pool.v_pages[numbers] = tensors[f"v.{layer}"][at.start : at.stop].to(pool.v_pages.device)
            columns.append(numbers)
        return list(zip(*columns, strict=True))

    def _make_pools(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Pools for keys [.., Hkv, .., D] and values of every layer, where there are none yet."""
        if not self._pools:
            device = self._model.device
            self._pools = [
                PagePool(k.shape[1], k.shape[3], v.shape[3], page=self.page, dtype=k.dtype, device=device)
                for k, v in rows
            ]

    def _extend(self, lease: Lease, ids: list[int]) -> None:
        """Compute the whole pages of `ids` behind the leased ones and keep them where there is room."""
        have, whole = len(lease.pages) * self.page, len(ids) // self.page * self.page
        if whole <= have:
            return
        cache = self._attached([lease.pages])
        try:
            prefill(
                self._model, torch.tensor([ids[have:whole]], device=self._model.device), cache, self.chunk
            )
            if not self._pools:
                self._pools = [layer.view.pool for layer in cache.layers]
            columns = [layer.view.pages(0)[have // self.page :] for layer in cache.layers]
            pages: list[Pages] = list(zip(*columns, strict=True))
            if self.tree.add(lease, ids[have:whole], pages):
                for pool, column in zip(self._pools, columns, strict=True):
                    for page in column:
                        pool.retain(page)
        finally:
            cache.reset()

    def _attached(self, rows: Sequence[Sequence[Pages]]) -> PagedCache:
        """A cache whose sequences begin with pages that are held."""
        cache = self._empty()
        for i, (layer, pool) in enumerate(zip(cache.layers, self._pools, strict=False)):
            layer.attach(pool, [[page[i] for page in row] for row in rows])
        return cache

    def _drop(self, pages: Sequence[Pages]) -> None:
        for page in pages:
            for pool, number in zip(self._pools, page, strict=True):
                pool.release(number)

    def _padding(self) -> int:
        token = self._model.generation_config.pad_token_id
        return 0 if token is None else int(token)


def prefix_cache(
    model: Any,
    capacity: int,
    page: int = 16,
    pipeline: Any = "relay-attention",
    cost: Cost | None = None,
    chunk: int = 512,
) -> PrefixCache:
    """An empty cache of prompts for `model`, a causal language model of transformers.

    capacity: most tokens kept. page: tokens of a page. pipeline: `relay-attention` with its options: prompts
    of a batch that begin with the same pages attend to them together. cost: of computing tokens behind cached
    ones, by which prompts give way; None: operations by the model's sizes (a `CostTable` holds measured
    ones). chunk: tokens computed at once. OptionError where `kv_cache` refuses the model or a value.
    """
    for name, value in {"capacity": capacity, "chunk": chunk}.items():
        if value < page:
            raise OptionError(f"{name} = {value}: expected a page of {page} tokens or more")
    return PrefixCache(model, capacity, page, pipeline, cost, chunk)


def _ids(tokens: Sequence[int] | Tensor) -> list[int]:
    found = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    if not found or not all(isinstance(token, int) for token in found):
        raise OptionError("the tokens of a prompt are not 1 or more integers", remedy="give one axis of ids")
    return found


def _rows(prompts: list[list[int]], held: list[int], pad: int) -> dict[str, Tensor]:
    """The tokens of a batch and where they are tokens, int64 [B, S]."""
    begin = max(held)
    width = max(len(ids) - have for ids, have in zip(prompts, held, strict=True))
    tokens = torch.full((len(prompts), begin + width), pad)
    mask = torch.zeros_like(tokens)
    for row, (ids, have) in enumerate(zip(prompts, held, strict=True)):
        tokens[row, :have], mask[row, :have] = torch.tensor(ids[:have], dtype=torch.int64), 1
        tokens[row, begin + width - (len(ids) - have) :] = torch.tensor(ids[have:])
        mask[row, begin + width - (len(ids) - have) :] = 1
    return {"input_ids": tokens, "attention_mask": mask}
