"""Cache layers of few bits whose rows come back from host memory a step ahead: `spec-cache-kv` in a cache.

paper: arXiv:2503.16163 (SpeCache).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.ops.paged import wide
from tilewright.frontends.kv_layer import PagedLayer
from tilewright.passes.memory import _few_bits as few_bits
from tilewright.passes.memory._few_bits import Codes
from tilewright.passes.memory.spec_cache_kv import SpecCacheKV
from tilewright.runtime.kv_store.host_rows import HostRows
from tilewright.runtime.kv_store.transfers import Job, Ticket, TransferThreads, Urgency

GENERATE = "tilewright.frontends.kv_spec_generate.generate_with_guesses"
"""What takes the two tokens of a step."""


@dataclass
class FetchCounters:
    """What moved between the tiers."""

    fetches: int = 0
    """Of one sequence at one layer."""
    late: int = 0
    """Fetches that had not ended when their rows were needed."""
    bytes_read: int = 0
    bytes_written: int = 0


class Ahead:
    """Rows of one sequence and layer on their way to the fast tier."""

    def __init__(self, slow: HostRows, index: Tensor) -> None:
        """index: int64 [Hkv, k], which rows; moved to host memory."""
        self.index = index
        self._at = index.cpu()
        self._slow = slow
        self.rows: Tensor | None = None
        """[Hkv, k, D + E], once the job is done."""
        self.job = Job(self._read)

    def _read(self) -> None:
        self.rows = self._slow.read(self._at)


class SpecTier:
    """The slow tier behind all layers of one cache, and the threads that fetch from it."""

    def __init__(self, policy: SpecCacheKV) -> None:
        self.policy = policy
        self.layers: list[SpecCacheLayer] = []
        self.counters = FetchCounters()
        self.open_rows: Callable[[int, int, torch.dtype], HostRows] = HostRows
        """Makes the slow tier of one sequence at one layer, from heads, width and dtype; another may be set
        before anything is stored."""
        self.label = ""
        self._threads: TransferThreads | None = None

    def opened(self, heads: int, width: int, dtype: torch.dtype) -> HostRows:
        """The slow tier of one sequence at one layer."""
        rows = self.open_rows(heads, width, dtype)
        self.label = rows.label
        return rows

    def fetch(self, slow: HostRows, index: Tensor) -> Ahead:
        """Begin to read rows int64 [Hkv, k]."""
        if self._threads is None:
            self._threads = TransferThreads()
        ahead = Ahead(slow, index)
        self.counters.fetches += 1
        self.counters.bytes_read += index.numel() * slow.row_bytes
        self._threads.submit([(ahead.job, Urgency.PREFETCH)])
        return ahead

    def arrived(self, ahead: Ahead) -> Tensor | None:
        """[Hkv, k, D + E]: the rows; None where they are late and the policy does not wait."""
        if not ahead.job.done:
            self.counters.late += 1
            if self.policy.on_late == "lowbit":
                return None
        Ticket([ahead.job]).wait()
        return ahead.rows

    def statistics(self) -> dict[str, Any]:
        """Of this cache so far: bytes in the fast tier and in all, and what moved (`FetchCounters`)."""
        return {
            "slow_tier": self.label,
            "resident_bytes": sum(layer.fast_bytes for layer in self.layers),
            "held_bytes": sum(layer.held_bytes for layer in self.layers),
            **asdict(self.counters),
        }

    def close(self) -> None:
        """End the threads; twice is fine."""
        if self._threads is not None:
            self._threads.close()
        self._threads = None


class FewBitRows:
    """Keys and values of one sequence at one layer: codes of the first tokens, then rows as they are."""

    def __init__(self, policy: SpecCacheKV, slow: HostRows, k: Tensor, v: Tensor) -> None:
        """k [Hkv, 0, D], v [Hkv, 0, E]: of the shape and dtype of what will come."""
        self.policy, self.slow = policy, slow
        self.coded = 0
        self.tail = (k, v)
        self.codes: tuple[Codes, Codes] | None = None
        """Of keys and values, each [Hkv, coded, ...]."""
        self.ahead: Ahead | None = None

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.coded + self.tail[0].shape[1]

    @property
    def fast_bytes(self) -> int:
        """Bytes of codes, scales, rows as they are, and rows that were fetched or are on their way."""
        held = [*self.tail, *[x for codes in self.codes or () for x in codes]]
        count = sum(x.numel() * x.element_size() for x in held)
        return count if self.ahead is None else count + self.ahead.index.numel() * self.slow.row_bytes

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add k [Hkv, T, D], v [Hkv, T, E]."""
        old_k, old_v = self.tail
        self.tail = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)

    def crop(self, length: int) -> None:
        """Take back the tokens from `length` on; none is in the slow tier."""
        k, v = (x[:, : length - self.coded].clone() for x in self.tail)
        self.tail = k, v

    def archive(self, count: int) -> int:
        """Write the rows of the first `count` tokens to the slow tier; the bytes written."""
        start = self.slow.length
        if count <= start:
            return 0
        k, v = (x[:, start - self.coded : count - self.coded] for x in self.tail)
        self.slow.append(torch.cat([k, v], 2))
        return (count - start) * k.shape[0] * self.slow.row_bytes

    def encode(self, count: int) -> None:
        """Keep of the first `count` tokens only their codes, in the fast tier.

        OptionError for keys or values that have no scale in float16."""
        if count <= self.coded:
            return
        policy, fresh = self.policy, count - self.coded
        k, v = self.tail
        new = (
            few_bits.encoded_keys(k[:, :fresh], policy.group, policy.bits),
            few_bits.encoded_values(v[:, :fresh], policy.group, policy.bits),
        )
        if not all(bool(codes.numbers.isfinite().all()) for codes in new):
            raise OptionError(
                "spec-cache-kv: a key or value is not finite, or beyond 65504 where scales are float16"
            )
        if self.codes is not None:
            pairs = zip(self.codes, new, strict=True)
            keys, values = (
                Codes(*(torch.cat(x, 1) for x in zip(old, more, strict=True))) for old, more in pairs
            )
            new = keys, values
        self.codes, self.coded = new, count
        self.tail = k[:, fresh:].clone(), v[:, fresh:].clone()

    def rows(self, fetched: Tensor | None) -> tuple[Tensor, Tensor]:
        """k [Hkv, S, D], v [Hkv, S, E]: what the codes stand for and the newest rows, with those of `ahead`
        in the places of theirs."""
        k, v = self.tail
        if self.codes is None:
            return k, v
        keys, values = self.codes
        near_k = few_bits.near_keys(keys, self.policy.bits).to(k.dtype)
        near_v = few_bits.near_values(values, self.policy.bits).to(v.dtype)
        if fetched is not None and self.ahead is not None:
            exact_k, exact_v = fetched.to(k.device).split([k.shape[2], v.shape[2]], 2)
            at = self.ahead.index[:, :, None]
            near_k.scatter_(1, at.expand_as(exact_k), exact_k)
            near_v.scatter_(1, at.expand_as(exact_v), exact_v)
        return torch.cat([near_k, k], 1), torch.cat([near_v, v], 1)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(attention [H, T, E] of the newest tokens q [H, T, D] to k [Hkv, S, D], v [Hkv, S, E]; what the last of
    them gives to every row, [Hkv, G, S])."""
    (heads, size, _), tokens, kind = k.shape, q.shape[1], wide(q)
    rows = q.to(kind).unflatten(0, (heads, -1)).flatten(1, 2)
    scores = (rows @ k.to(kind).mT).mul_(scale).unflatten(1, (-1, tokens))
    later = torch.ones(tokens, size, dtype=torch.bool, device=q.device).triu(size - tokens + 1)
    weights = scores.masked_fill_(later, float("-inf")).softmax(-1)
    out = (weights.flatten(1, 2) @ v.to(kind)).unflatten(1, (-1, tokens)).flatten(0, 1)
    return out.to(q.dtype), weights[:, :, -1]


class SpecCacheLayer(PagedLayer):
    """Attends codes, the newest rows, and those that the guess of the step before ranked highest."""

    def __init__(self, index: int, page: int, check: Callable[[], None], tier: SpecTier) -> None:
        super().__init__(index, page, check)
        self.tier, self.policy = tier, tier.policy
        self.guessing = False
        """Whether the last of the tokens to come is a guess, which chooses and is taken back."""
        self._rows: list[FewBitRows] = []
        self._slots = 0
        self._first: list[int] = []
        tier.layers.append(self)

    @property
    def fast_bytes(self) -> int:
        """Bytes in the fast tier."""
        return sum(row.fast_bytes for row in self._rows)

    @property
    def held_bytes(self) -> int:
        """Bytes in both tiers."""
        return self.fast_bytes + sum(row.slow.nbytes for row in self._rows)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for keys [B, Hkv, T, D] and values [B, Hkv, T, E]; OptionError where groups do not divide
        the channels. Done once."""
        if self.is_initialized:
            return
        (batch, heads, _, size), value = key_states.shape, value_states.shape[3]
        group = self.policy.group
        if size % group or value % group:
            raise OptionError(
                f"spec-cache-kv: group = {group}: expected a divisor of the channels of a head, {size} and "
                f"{value}"
            )
        self._rows = [
            FewBitRows(
                self.policy,
                self.tier.opened(heads, size + value, key_states.dtype),
                key_states.new_empty(heads, 0, size),
                value_states.new_empty(heads, 0, value),
            )
            for _ in range(batch)
        ]
        self.is_initialized = True

    def store(self, key_states: Tensor, value_states: Tensor) -> None:
        """Count the new rows; `attend` stores them, which knows the padding.

        OptionError for tokens behind the prompt without a guess among them.
        """
        if self._slots and not self.guessing:
            raise OptionError(
                f"layer {self.index}: behind a prompt spec-cache-kv takes a token and a guess each step",
                remedy=f"model.generate(..., custom_generate={GENERATE})",
            )
        self._slots += key_states.shape[2]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Attention [B, H, T, E] of the T newest tokens; k, v are their own rows."""
        self._fresh = False
        start, outs = self._slots - q.shape[2], []
        self._first = [0] * len(self._rows) if first is None else first.tolist()
        for b, row in enumerate(self._rows):
            padding = min(max(self._first[b] - start, 0), q.shape[2])
            row.append(k[b, :, padding:], v[b, :, padding:])
            outs.append((self._step if self.guessing else self._prompt)(row, q[b : b + 1], scale))
        return torch.cat(outs)

    def _round(self, row: FewBitRows, length: int) -> None:
        """Round what `length` tokens leave to round; the rows themselves go to the slow tier."""
        count = self.policy.coded(length)
        self.tier.counters.bytes_written += row.archive(count)
        row.encode(count)

    def _prompt(self, row: FewBitRows, q: Tensor, scale: float) -> Tensor:
        """Attention [1, H, T, E] of the prompt of one sequence, over its rows as they are."""
        (k, v), padding = row.tail, q.shape[2] - row.length
        out = scaled_dot_product_attention(
            q[:, :, padding:], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True
        )
        self._round(row, row.length)
        return pad(out, (0, 0, padding, 0))

    def _step(self, row: FewBitRows, q: Tensor, scale: float) -> Tensor:
        """Attention [1, H, T, E] of the newest tokens of one sequence; the last, a guess, orders the rows for
        the next step."""
        policy = self.policy
        alone = q.shape[2] == 1  # the token that the next step takes again, beside a guess
        self._round(row, row.length - (not alone))
        fetched = None if row.ahead is None else self.tier.arrived(row.ahead)
        out, shares = _attention(q[0], *row.rows(fetched), scale)
        row.ahead = None
        coming = policy.coded(row.length)  # one of the tokens to come is no guess
        if coming > 0:
            self.tier.counters.bytes_written += row.archive(coming)
            ranks = policy.ranks(shares)[:, :coming]
            row.ahead = self.tier.fetch(row.slow, ranks.topk(min(policy.budget, coming)).indices)
        return out[None]

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self._slots

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._rows, self._first, self._slots, self.guessing = [], [], 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest -tokens_to_remove tokens; OptionError where one is in the slow tier."""
        if tokens_to_remove > 0:
            raise OptionError(f"crop({tokens_to_remove}): expected 0 or less, the negative count of tokens")
        length = max(self._slots + tokens_to_remove, 0)
        left = [(row, max(length - start, 0)) for row, start in zip(self._rows, self._first, strict=True)]
        for row, count in left:
            if count < row.slow.length:
                raise OptionError(
                    f"spec-cache-kv: token {count} cannot be taken back: {row.slow.length} are in slow memory"
                )
        for row, count in left:
            row.crop(count)
            if tokens_to_remove < -1:
                row.ahead = None  # some of what was chosen may not be rounded yet
        self._slots = length

    def select_rows(self, rows: Sequence[int]) -> None:
        """Refused unless every sequence stays as it is."""
        if self._rows and list(rows) != list(range(len(self._rows))):
            raise OptionError(
                "spec-cache-kv: sequences cannot be reordered or repeated", remedy="num_beams=1"
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused unless once."""
        self.select_rows([row for row in range(len(self._rows)) for _ in range(repeats)])
