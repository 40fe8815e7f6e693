"""`tilewright.speculate`: text exactly as the target alone would write it, in fewer of the target's steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.compiler.diagnostics import OptionError, shown
from tilewright.frontends.drafters import Draft, Drafter, ModelDrafter, RetrievalDrafter
from tilewright.frontends.kv_rows import KVRows, RowModel
from tilewright.frontends.language_model import LanguageModel, check_same_vocabulary
from tilewright.frontends.sampling import Sampling
from tilewright.frontends.speculation_rounds import Round, Row, Statistics, Stop, compiled_graphs
from tilewright.frontends.token_trees import ModelTrees, RetrievalTrees, TreeDrafter, feed_trees
from tilewright.runtime.draft_length import DraftLength
from tilewright.runtime.retrieval import NgramStore
from tilewright.runtime.token_tree import TokenTree

SLACK = 64
"""Slots of a batch's cache for holes, before they must be closed."""
OnTokens = Callable[[int, list[int]], None]
"""on_tokens(row, its new tokens), after each round."""


@dataclass
class Retrieval:
    """A draft from text that was seen before: the prompt and answer themselves, and a datastore if given."""

    datastore: Iterable[Sequence[int]] = ()
    """Tokenized texts."""
    shortest: int = 2
    """Tokens that must agree."""
    longest: int = 16
    """Tokens that are compared at most; a longer agreement is preferred."""


@dataclass
class Speculator:
    """Made by `speculate`. Generates for one caller at a time; what it learnt about its costs is kept."""

    target: LanguageModel
    draft: LanguageModel | Retrieval | None
    length: DraftLength
    statistics: Statistics = field(default_factory=Statistics)
    """Of the latest generation."""
    tree: bool = False
    """Whether drafts are trees; a length then counts their nodes."""
    branches: int = 4
    """Children of a node at most."""

    def __post_init__(self) -> None:
        self._busy = threading.Lock()
        self._caches: dict[str, KVRows] = {}
        self._datastore: NgramStore | None = None
        if isinstance(self.draft, Retrieval):
            texts = [list(t) for t in self.draft.datastore]
            store = NgramStore(texts, shortest=self.draft.shortest, longest=self.draft.longest)
            self._datastore = store if texts else None

    def generate(
        self,
        tokens: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_tokens: Iterable[int] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> list[list[int]]:
        """All tokens of every row, prompt included.

        tokens: int64 [B, S], or rows of different lengths without padding. temperature 0 is greedy.
        stop_tokens: end a row; the model's end-of-text tokens by default.
        """
        rows = tokens.tolist() if isinstance(tokens, Tensor) else [list(row) for row in tokens]
        sampling = Sampling.of(temperature, top_k, top_p, seed)
        ends = frozenset(self.target.stop_tokens if stop_tokens is None else stop_tokens)
        result = [list(row) for row in rows]
        for new in self.rounds(rows, max_new_tokens, sampling, lambda held: held[-1] in ends):
            for row, taken in enumerate(new):
                result[row] += taken
                if on_tokens is not None and taken:
                    on_tokens(row, taken)
        return result

    def stream(self, tokens: Tensor | Sequence[int], max_new_tokens: int = 128, **how: Any) -> Iterator[int]:
        """The new tokens of one row, each as soon as it is certain. how: as for `generate`."""
        flat = tokens.reshape(-1).tolist() if isinstance(tokens, Tensor) else list(tokens)
        ends = frozenset(how.pop("stop_tokens", None) or self.target.stop_tokens)
        given = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": None, **how}
        if len(given) > 4:
            raise OptionError(
                f"stream: unknown {sorted(set(how) - {'temperature', 'top_k', 'top_p', 'seed'})}"
            )
        sampling = Sampling.of(**given)
        for new in self.rounds([flat], max_new_tokens, sampling, lambda held: held[-1] in ends):
            yield from new[0]

    def rounds(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, stop: Stop
    ) -> Iterator[list[list[int]]]:
        """The new tokens of every row, round by round."""
        if not prompts or not all(prompts) or max_new_tokens < 1:
            raise OptionError(
                f"{len(prompts)} prompts of {[len(p) for p in prompts[:8]]} tokens, max_new_tokens = "
                f"{max_new_tokens}: expected at least one token each"
            )
        self.target.check_room(max(map(len, prompts)) + max_new_tokens)
        if not self._busy.acquire(blocking=False):
            raise OptionError("this speculator is generating already", remedy="make one per thread")
        try:
            for model in (self.target, self.draft):
                if isinstance(model, LanguageModel):
                    model.look()
            yield from self._rounds(prompts, max_new_tokens, sampling, stop)
        finally:
            self._busy.release()

    def _rounds(
        self, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling, stop: Stop
    ) -> Iterator[list[list[int]]]:
        rows = [Row(list(p), len(p) + count) for p in prompts]
        room = max(row.last for row in rows) + self._width() + 1 + (SLACK if len(rows) > 1 else 0)
        target = self.target.rows(self._cache("target", self.target, len(rows), room))
        drafter = None if self.tree else self._drafter(target, sampling, room)
        trees = self._trees(target, sampling, room) if self.tree else None
        self.statistics = Statistics()
        started = time.perf_counter()
        logits = target.feed([row.tokens for row in rows], prompt=True)
        new = []
        for b, row in enumerate(rows):
            at = len(row.tokens) - 1
            new.append(row.take(sampling.accept(row.tokens, [], None, logits[b, at : at + 1]), stop))
        self.statistics.prompt_seconds = time.perf_counter() - started
        self.statistics.tokens = len(rows)
        yield new
        self.length.begin(len(rows))
        while not all(row.done for row in rows):
            started, graphs = time.perf_counter(), compiled_graphs()
            left, done = _left(rows), Round()
            if trees is not None:
                done = self._tree_round(rows, target, trees, sampling, stop)
            if not done.new:
                done = self._round(rows, target, drafter, sampling, stop)
            seconds = time.perf_counter() - started
            if compiled_graphs() == graphs:
                # What the row got that is farthest from its end: the others wait for it.
                tokens = min(left - _left(rows), max(map(len, done.new)))
                self.length.observe(done.length, seconds, tokens, done.kept, done.tried)
            self._count(done, sum(map(len, done.new)), seconds)
            yield done.new

    def _round(
        self, rows: Sequence[Row], target: RowModel, drafter: Drafter | None, sampling: Sampling, stop: Stop
    ) -> Round:
        """Draft, let the target answer once, keep what it confirms and one token more, in every row."""
        left = [0 if row.done else row.last - len(row.tokens) - 1 for row in rows]
        length = self.length.choose(max(left)) if drafter is not None else 0
        drafts = [Draft() for _ in rows]
        if drafter is not None and length:
            drafts = drafter.propose([row.tokens for row in rows], [min(length, n) for n in left])
        longest = max(len(d.tokens) for d in drafts)
        length = min(n for n in self.length.lengths if n >= longest)
        kv = target.kv
        kv.reserve(length + 1)
        start = kv.length
        fed = [[] if r.done else [r.tokens[-1], *d.tokens] for r, d in zip(rows, drafts, strict=True)]
        logits = target.feed(fed, length + 1)
        new, kept, tried, accepted = [], 0, 0, []
        for b, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            n, found = len(draft.tokens), list[int]()
            if not row.done:
                found = sampling.accept(row.tokens, draft.tokens, draft.distributions, logits[b, : n + 1])
            accepted.append(max(0, len(found) - 1))
            kept, tried = kept + accepted[b], tried + min(n, len(found))
            new.append(row.take(found, stop) if found else [])
        kv.take_back(start, [len(n) for n in new])
        if drafter is not None and longest:
            drafter.commit(accepted)
        return Round(new, length, sum(len(d.tokens) for d in drafts), kept, tried)

    def _tree_round(
        self, rows: Sequence[Row], target: RowModel, drafter: TreeDrafter, sampling: Sampling, stop: Stop
    ) -> Round:
        """Draft a tree per row, let the target answer all of them at once, keep one path and one token more
        of each. Nothing where no row has a draft: a plain step is then the same as without trees."""
        texts = [row.tokens for row in rows]
        left = [0 if row.done else row.last - len(row.tokens) - 1 for row in rows]
        nodes = self.length.choose(self.length.lengths[-1]) if any(left) else 0
        trees = drafter.propose(texts, nodes, left) if nodes else [TokenTree() for _ in rows]
        drafted = [len(tree.tokens) for tree in trees]
        if not any(drafted):
            return Round()
        nodes = min(n for n in self.length.lengths if n >= max(drafted))
        kv = target.kv
        kv.reserve(nodes + 1)
        start = kv.length
        logits = feed_trees(target, trees, texts, nodes + 1)
        new, chosen, kept, tried = [], [], 0, 0
        for b, (row, tree) in enumerate(zip(rows, trees, strict=True)):
            found, path = list[int](), list[int]()
            if not row.done:
                path, last = sampling.accept_tree(row.tokens, tree, logits[b, : drafted[b] + 1])
                found = row.take([*[tree.tokens[n] for n in path], last], stop)
            kept, tried = kept + len(path), tried + min(drafted[b], len(path) + 1)
            new.append(found)
            chosen.append([0, *[n + 1 for n in path]][: len(found)])
        kv.keep(start, chosen)
        return Round(new, nodes, sum(drafted), kept, tried)

    def _trees(self, target: RowModel, sampling: Sampling, room: int) -> TreeDrafter | None:
        if self.draft is None:
            return None
        if isinstance(self.draft, Retrieval):
            given = (self._datastore, self.branches, self.draft.shortest, self.draft.longest)
            return RetrievalTrees(target.kv.batch, *given)
        shared = self.draft.shares(self.target)
        kv = target.kv if shared else self._cache("draft", self.draft, target.kv.batch, room + self._width())
        return ModelTrees(self.draft.rows(kv), sampling, self.branches, shared=shared)

    def _count(self, done: Round, tokens: int, seconds: float) -> None:
        s = self.statistics
        s.tokens, s.target_calls, s.seconds = s.tokens + tokens, s.target_calls + 1, s.seconds + seconds
        s.drafted, s.accepted = s.drafted + done.drafted, s.accepted + done.kept
        s.drafting_rounds += bool(done.drafted)

    def _width(self) -> int:
        return self.length.lengths[-1] + 1

    def _cache(self, role: str, model: LanguageModel, batch: int, room: int) -> KVRows:
        """The cache used before when it is large enough: compiled code and memory stay."""
        held = self._caches.get(role)
        if held is None or held.batch != batch or held.capacity < room:
            held = self._caches[role] = KVRows(model.config, batch, room)
        held.clear()
        return held

    def _drafter(self, target: RowModel, sampling: Sampling, room: int) -> Drafter | None:
        batch = target.kv.batch
        if self.draft is None:
            return None
        if isinstance(self.draft, Retrieval):
            return RetrievalDrafter(batch, self._datastore, self.draft.shortest, self.draft.longest)
        if self.draft.shares(self.target):
            return ModelDrafter(self.draft.rows(target.kv), sampling, shared=True)
        own = self._cache("draft", self.draft, batch, room + self._width())
        return ModelDrafter(self.draft.rows(own), sampling, shared=False)

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        on_tokens: OnTokens | None = None,
        **given: Any,
    ) -> Tensor:
        """What `model.generate(ids, custom_generate=speculator)` calls: its processors and stopping criteria
        apply, and `on_tokens=` may be given to it (it keeps a `streamer=` from custom functions). `model`
        must be this speculator's target. Returns int64 [B, S + new], padded behind the end."""
        if not self.target.is_module(model):
            raise OptionError(f"generate() of another model ({type(model).__name__}) than the target")
        if generation_config.num_beams not in (None, 1) or generation_config.return_dict_in_generate:
            raise OptionError("speculation returns one sequence of tokens per row: no beams, no dictionary")
        rows = input_ids.tolist()
        attention_mask = given.get("attention_mask")
        if attention_mask is not None:
            rows = [
                [t for t, seen in zip(row, mask, strict=True) if seen]
                for row, mask in zip(rows, attention_mask.tolist(), strict=True)
            ]
        sampling = Sampling(logits_processor, sample=bool(generation_config.do_sample), generator=None)
        added = [input_ids.shape[1] - len(row) for row in rows]

        def stop(held: list[int]) -> bool:
            ids = torch.tensor([held], device=input_ids.device)
            return bool(stopping_criteria(ids, None).all())

        count = generation_config.max_length - input_ids.shape[1]
        new: list[list[int]] = [[] for _ in rows]
        for step in self.rounds(rows, count, sampling, stop):
            for b, taken in enumerate(step):
                new[b] += taken
                if on_tokens is not None and taken:
                    on_tokens(b, taken)
        pad = generation_config.pad_token_id
        pad = (rows[0][0] if pad is None else pad) if len(rows) > 1 or any(added) else 0
        longest = max(map(len, new))
        tail = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in new], dtype=input_ids.dtype)
        return torch.cat((input_ids, tail.to(input_ids.device)), 1)


def _left(rows: Sequence[Row]) -> int:
    """Tokens that the row farthest from its end may still get."""
    return max((row.last - len(row.tokens) for row in rows if not row.done), default=0)


def speculate(
    target: Any,
    draft: Any = "retrieval",
    *,
    pipeline: Any = None,
    lengths: Sequence[int] | None = None,
    prior: float = 0.7,
    tree: int = 0,
    branches: int = 4,
) -> Speculator:
    """Lossless generation: `draft` proposes, `target` confirms; the text is the target's own.

    target: a Hugging Face causal language model, or `torch.compile` of one. pipeline: compile the target with
    these passes. draft: the text of a (lossy) pipeline over the target's own weights, which shares its cache;
    another model of the same vocabulary, compiled or not; a `Retrieval` or the word `retrieval`; None for
    plain decoding. lengths: how many tokens may be drafted in a round; 0 is always allowed, and taken
    while drafting does not pay. Compiled targets compile once per length, so they get few by default, and at
    most 7, because the kernels for few rows end at 8. prior: the acceptance that is assumed before anything
    was seen. tree: draft trees of up to so many tokens, 1 to 64 per row, instead of one line (0); the target
    answers whole trees at once; takes the place of lengths. branches: how many tokens may follow one; 1 makes
    a line of it.

    Greedy text equals the target's up to ties of its own rounding; sampled text has the target's
    distribution. Raises OptionError for a draft of another vocabulary or a target that cannot take tokens
    back.
    """
    model = LanguageModel.of(target, pipeline)
    drafting: LanguageModel | Retrieval | None
    if draft is None or isinstance(draft, Retrieval):
        drafting = draft
    elif draft == "retrieval":
        drafting = Retrieval()
    elif isinstance(draft, str):
        drafting = LanguageModel.of(model.module, draft)
    elif isinstance(draft, nn.Module):
        drafting = LanguageModel.of(draft, None)
        check_same_vocabulary(model, drafting)
    else:
        raise OptionError(
            f"draft = {shown(draft)}: expected a pipeline's text, a model, a Retrieval, 'retrieval' or None"
        )
    retrieves = isinstance(drafting, Retrieval)
    if lengths is None:
        few, many = ((7,), (2, 4, 8, 12)) if retrieves else ((3,), (1, 2, 3, 4, 6))
        lengths = few if model.compiled else many
    if any(not isinstance(n, int) or not 0 <= n <= 64 for n in lengths) or len(set(lengths)) != len(lengths):
        raise OptionError(f"lengths = {tuple(lengths)}: expected different numbers, 0 to 64")
    if not 0 <= tree <= 64 or branches < 1:
        raise OptionError(f"tree = {tree}, branches = {branches}: expected 0 to 64, and 1 or more")
    if tree:
        lengths = (tree,)
    if not 0.0 < prior < 1.0:
        raise OptionError(f"prior = {prior}: expected between 0 and 1")
    choice = DraftLength([0, *[n for n in lengths if n]], prior=prior)
    return Speculator(model, drafting, choice, tree=bool(tree), branches=branches)
