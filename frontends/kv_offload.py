"""Cache layers whose keys and values lie in extents of a fast tier of fixed size and a slow one behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.kv_choice import SharedChoice
from tilewright.frontends.kv_extents import ExtentLayer, Picked
from tilewright.frontends.kv_layer import PagedLayer
from tilewright.passes.memory._early_choice import Ranking
from tilewright.passes.memory.offload_kv import OffloadKV
from tilewright.runtime.kv_store.extents import ExtentFile, ExtentLayout, ExtentStore
from tilewright.runtime.kv_store.links import HostExtents
from tilewright.runtime.kv_store.tier import TierManager
from tilewright.runtime.kv_store.tier_state import ExtentKey, Fetch
from tilewright.runtime.store import user_folder

TAILS = -1
"""What stands for the layer in the keys of extents that hold the tails of all layers."""
TAIL_SHARE = 8
"""One in so many frames may hold tails."""


class Placement:
    """The tiers behind all layers of one cache."""

    def __init__(self, policy: OffloadKV, open_store: Callable[[int], ExtentStore] | None = None) -> None:
        """open_store: makes the slow tier of one sequence from the bytes of an extent; None: as `policy`
        says."""
        self.policy = policy
        self.layers: list[OffloadedLayer] = []
        self.open_store = open_store or self._store
        """Makes the slow tier of one sequence; another may be set before anything is stored."""
        self._tiers: TierManager | None = None
        self._sessions: list[int] = []
        self._picked: tuple[Tensor, list[Picked]] | None = None
        self._tails: list[int] = []
        """Entries of pages in the pool of the frames that no extent has, for the layers to take."""
        self._tail_frames: Fetch | None = None
        self.label = ""
        """What the slow tier is; empty before it was opened."""

    def _store(self, extent_bytes: int) -> ExtentStore:
        if self.policy.tier == "host":
            return HostExtents()
        folder = Path(self.policy.folder) if self.policy.folder else user_folder() / "kv"
        return ExtentFile(folder, extent_bytes)

    def tiers(self, layout: ExtentLayout, batch: int) -> tuple[TierManager, list[int]]:
        """(the tiers, the session of each sequence), opened for the first layer that stores anything."""
        if self._tiers is None:
            if self.policy.fast_bytes < layout.extent_bytes:
                raise OptionError(
                    f"offload-kv: fast_bytes = {self.policy.fast_bytes}: an extent of this model has "
                    f"{layout.extent_bytes} bytes",
                    remedy="give one extent or more",
                )

            def opened() -> ExtentStore:
                store = self.open_store(layout.extent_bytes)
                self.label = store.label
                return store

            self._tiers = TierManager(self.policy.fast_bytes, layout.extent_bytes, opened)
            self._sessions = [self._tiers.open_session() for _ in range(batch)]
            self._open_tails(self._tiers, layout, batch * len(self.layers))
        return self._tiers, self._sessions

    def _open_tails(self, tiers: TierManager, layout: ExtentLayout, count: int) -> None:
        """Make `count` pages for the rows that are new, in frames that stay pinned, where those are few."""
        keys = [ExtentKey(self._sessions[0], TAILS, run) for run in range(-(-count // layout.pages))]
        if layout.one_size and len(keys) <= tiers.frames // TAIL_SHARE:
            for key in keys:
                with tiers.edit(key):
                    pass
            self._tail_frames = tiers.fetch(keys)
            tiers.wait(self._tail_frames)
            self._tails = layout.pool(tiers.memory).table(tiers.places(keys)).flatten().tolist()

    def tail(self) -> int | None:
        """The entry of a page for one sequence of a layer; None: there is none left."""
        return self._tails.pop() if self._tails else None

    def picked(self, positions: Tensor, rows: ExtentRows) -> list[Picked]:
        """Where int32 [B, 1, m] tokens of the sequences lie: found once for all layers that attend them."""
        if self._picked is None or self._picked[0] is not positions:
            self._picked = positions, [row.pick(positions[i, 0]) for i, row in enumerate(rows.rows)]
        return self._picked[1]

    @property
    def latest(self) -> list[Picked] | None:
        """Where the tokens lie that were chosen last."""
        return None if self._picked is None else self._picked[1]

    def announce(self, keys: Sequence[ExtentKey]) -> None:
        """These extents will be wanted."""
        if self._tiers is not None:
            self._tiers.prefetch(keys)

    def statistics(self) -> dict[str, Any]:
        """Of this cache so far: what moved (`TierCounters`), the bytes resident, the most they may be, and
        those that a policy holds in memory beside them."""
        if self._tiers is None:
            return {"slow_tier": self.label, "fast_bytes": self.policy.fast_bytes}
        counters = asdict(self._tiers.counters)
        asked = counters["hits"] + counters["misses"] + counters["late"]
        return {
            "slow_tier": self.label,
            "fast_bytes": self.policy.fast_bytes,
            "resident_bytes": self._tiers.resident_bytes,
            "beside_bytes": sum(layer.beside_bytes for layer in self.layers),
            "held_bytes": sum(layer.held_bytes for layer in self.layers),
            "hit_rate": counters["hits"] / asked if asked else 1.0,
            **counters,
        }

    def close(self) -> None:
        """Give back both tiers; twice is fine."""
        if self._tiers is not None:
            if self._tail_frames is not None:
                self._tiers.release(self._tail_frames)
            self._tiers.close()
        self._tiers, self._sessions, self._picked = None, [], None
        self._tail_frames, self._tails = None, []


class ExtentRows:
    """Sequences of one layer in extents: what `LayerView` is for pages of one pool."""

    def __init__(self, rows: list[ExtentLayer], layout: ExtentLayout) -> None:
        self.rows, self.layout, self.batch = rows, layout, len(rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sequence."""
        return [row.length for row in self.rows]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add k [B, Hkv, T, D], v [B, Hkv, T, E] to the ends."""
        for i, row in enumerate(self.rows):
            row.append(k[i : i + 1], v[i : i + 1])

    def crop(self, lengths: Sequence[int]) -> None:
        """Take back the tokens from lengths[b] on."""
        for row, length in zip(self.rows, lengths, strict=True):
            row.crop(length)

    def free(self) -> None:
        """Forget every row."""
        self.crop([0] * self.batch)


class OffloadedLayer(PagedLayer):
    """Attends extent by extent: everything, or the tokens that an earlier layer chose."""

    def __init__(
        self,
        index: int,
        page: int,
        check: Callable[[], None],
        placement: Placement,
        choice: SharedChoice | None,
    ) -> None:
        super().__init__(index, page, check)
        self.placement, self.choice = placement, choice
        self._rows: ExtentRows | None = None
        placement.layers.append(self)

    @property
    def rows(self) -> ExtentRows:
        """The sequences of this layer; OptionError before anything was stored."""
        if self._rows is None:
            raise OptionError(f"layer {self.index} of the cache holds nothing yet")
        return self._rows

    @property
    def held_bytes(self) -> int:
        """Bytes of the extents in use, wherever they lie."""
        if self._rows is None:
            return 0
        return sum(row.runs for row in self._rows.rows) * self._rows.layout.extent_bytes

    @property
    def beside_bytes(self) -> int:
        """Bytes in memory beside the fast tier."""
        return 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Open the tiers for keys [B, Hkv, T, D] and values [B, Hkv, T, E]."""
        if key_states.device.type != "cpu":
            raise OptionError(f"offload-kv: keys on {key_states.device}: expected a model on the CPU")
        batch, heads, _, size = key_states.shape
        k_pages = key_states.new_empty(0, heads, self.page, size)
        v_pages = key_states.new_empty(0, heads, self.page, value_states.shape[3])
        policy = self.placement.policy
        layout = ExtentLayout.of(k_pages, v_pages, policy.extent_bytes)
        tiers, sessions = self.placement.tiers(layout, batch)
        tail = self.placement.tail
        rows = [ExtentLayer(tiers, s, self.index, layout, policy.prefetch, tail()) for s in sessions]
        self._rows = ExtentRows(rows, layout)
        self._view = self._rows  # type: ignore[assignment]
        self.is_initialized = True

    def dense(self, q: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Attention over everything held."""
        return self._attend(q, first, scale, None, None)

    def decode(self, q: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Everything, or what was chosen for this layer; a layer that chooses ranks the keys on the way."""
        choice, length = self.choice, self.get_seq_length()
        if choice is None or choice.fits(length):
            return self.dense(q, first, scale)
        if self.index in choice.layers:
            begins = [0] * len(q) if first is None else first.tolist()
            rankings = [choice.ranking(length, begin) for begin in begins]
            out = self._attend(q, first, scale, None, rankings)
            choice.choose_ranked(rankings, torch.tensor(self.rows.lengths), first)
            if (positions := choice.of(self.index, length)) is not None:
                self.placement.picked(positions, self.rows)
                self.placement.announce(self._coming(len(self.rows.rows) - 1))
            return out
        return self._attend(q, first, scale, choice.of(self.index, length), None)

    def _attend(
        self,
        q: Tensor,
        first: Tensor | None,
        scale: float,
        positions: Tensor | None,
        rankings: list[Ranking] | None,
    ) -> Tensor:
        outs = []
        picked = None if positions is None else self.placement.picked(positions, self.rows)
        for i, row in enumerate(self.rows.rows):
            out, _ = row.attend(
                q[i : i + 1],
                None if first is None else first[i : i + 1],
                scale,
                None if picked is None else picked[i],
                self._coming(i, q.shape[2]),
                None if rankings is None else rankings[i].add,
            )
            outs.append(out)
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    def _coming(self, row: int, tokens: int = 1) -> list[ExtentKey]:
        """Extents that will be wanted after those of a sequence at this layer: of the next sequences, of the
        next layers, and of the first ones for the next `tokens`; for a layer whose tokens are not chosen yet
        those of the latest choice."""
        layers, count = self.placement.layers, self.placement.policy.prefetch
        found = self._foreseen(row + 1, tokens)
        for layer in (*layers[self.index + 1 :], *layers[: self.index]):
            if len(found) >= count or layer._rows is None:
                break
            found += layer._foreseen(0, tokens)
        return found[:count]

    def _foreseen(self, start: int, tokens: int) -> list[ExtentKey]:
        choice, picked = self.choice, self.placement.latest
        if choice is None or tokens > 1 or not choice.reuses(self.index, self.get_seq_length()):
            picked = None
        rows = enumerate(self.rows.rows[start:], start)
        return [key for i, row in rows for key in row.wanted(None if picked is None else picked[i])]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._rows = None

    def select_rows(self, rows: Sequence[int]) -> None:
        """Refused unless every sequence stays as it is."""
        if self._rows is not None and list(rows) != list(range(self._rows.batch)):
            raise OptionError("offload-kv: sequences cannot be reordered or repeated", remedy="num_beams=1")
