"""Decode SmolLM2-135M with `lessismore-kv`, its cache behind an EMULATED link and all in memory, in turn.

Beside them, `spec-cache-kv` behind another link as fast, and a cache that keeps and attends everything.

The bandwidth of the link is what the policy's bookkeeping says can be hidden. A first pass with a link of no
limit counts the bytes that each layer reads in a step; the step of the cache in memory gives the time of a
layer. What a layer reads is known from the layer that chose it on (from the layer before, where everything is
attended), so that the least bandwidth which could carry all in time is the greatest quotient of bytes and
time over all runs of layers: of what is chosen and used within the run, and of its time. The fast tier holds
a share of the cache.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tilewright.frontends.kv_cache import PagedCache, kv_cache
from tilewright.frontends.kv_offload import Placement
from tilewright.frontends.kv_spec_cache import SpecTier
from tilewright.frontends.kv_spec_generate import GuessedText
from tilewright.frontends.loaders import resolve
from tilewright.passes.memory.lessismore_kv import LessIsMoreKV
from tilewright.runtime.kv_store.extents import ExtentError
from tilewright.runtime.kv_store.host_rows import LinkedRows
from tilewright.runtime.kv_store.links import SimLink

GOAL = 0.7
"""The least speed of decode with an offloaded cache over that of one in memory."""
TOKEN_BYTES = 2 * 3 * 64 * 4
"""Of a layer of SmolLM2 in float32."""
UNLIMITED = 1e15


class CountingLink(SimLink):
    """The emulated link, and how many bytes each layer read over it."""

    def __init__(self) -> None:
        super().__init__(UNLIMITED, 0.0)
        self.read_bytes: Counter[int] = Counter()
        self._counting = threading.Lock()

    def read_all(self, extents: Sequence[Hashable], outs: Sequence[Tensor]) -> dict[Hashable, ExtentError]:
        """As SimLink.read_all."""
        with self._counting:
            for extent, out in zip(extents, outs, strict=True):
                self.read_bytes[extent.layer] += out.numel()  # type: ignore[attr-defined]
        return super().read_all(extents, outs)


@dataclass
class Side:
    """One cache and the text that it wrote."""

    cache: PagedCache
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, model: Any, given: Tensor) -> None:
        """Decode one greedy token from ids [1, T], timed."""
        start = time.perf_counter()
        logits = model(given, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.tokens.append(int(logits[0, -1].argmax()))
        self.seconds.append(time.perf_counter() - start)


@dataclass
class GuessingSide(Side):
    """One of `spec-cache-kv`: a step takes a token and a guess."""

    text: GuessedText | None = None
    right: list[bool] = field(default_factory=list)
    """Of each step, whether its guess was the token that came."""

    def step(self, model: Any, given: Tensor) -> None:
        """As Side.step; ids of a prompt, or of a token."""
        start = time.perf_counter()
        if self.text is None:
            self.text = GuessedText(model, self.cache, torch.ones_like(given))
            token = self.text.prompt(given).argmax(-1)
        else:
            token = self.text.follow(given[0]).argmax(-1)
            self.right.append(torch.equal(token, self.text.meant))  # type: ignore[arg-type]
        self.tokens.append(int(token))
        self.seconds.append(time.perf_counter() - start)


def hideable(read: dict[int, float], choosing: tuple[int, ...], layers: int, layer_seconds: float) -> float:
    """Bytes per second that carry `read` (bytes of a step by layer) between choice and use."""
    known = []
    for use in range(layers):
        earlier = [c for c in choosing if c < use]
        known.append(use - 1 if use in choosing or not earlier else earlier[-1])
    need = 0.0
    for end in range(layers):
        for start in range(-1, end):
            inside = (read.get(use, 0.0) for use in range(end + 1) if known[use] >= start)
            need = max(need, sum(inside) / ((end - start) * layer_seconds))
    return need


def prefill(model: Any, side: Side, ids: Tensor, chunk: int) -> None:
    """Fill a cache with ids [1, S]."""
    for start in range(0, ids.shape[1], chunk):
        side.step(model, ids[:, start : start + chunk])
    del side.tokens[:-1], side.seconds[:]


def turn(model: Any, sides: list[Side], steps: int) -> None:
    """Decode in turn, the order of the sides changing with every step."""
    for side in sides:
        side.seconds.clear()
    for step in range(steps):
        for side in sides[:: 1 if step % 2 else -1]:
            side.step(model, torch.tensor([side.tokens[-1:]]))


def text_ids(count: int) -> Tensor:
    """[1, count]: the source of a module of the standard library, as the model reads it."""
    ids = resolve("smollm2").tokenizer(inspect.getsource(argparse))["input_ids"]  # type: ignore[misc]
    if len(ids) < count:
        raise SystemExit(f"--tokens {count}: the text has {len(ids)}")
    return torch.tensor([ids[:count]])


def report(sides: list[Side], links: list[CountingLink], before: dict[str, Any], steps: int) -> float:
    """Print what was measured; the ratio of speeds."""
    offloaded, memory = sides
    after = offloaded.cache.statistics()
    moved = {name: after[name] - before[name] for name in ("hits", "misses", "late", "prefetched", "dropped")}
    asked = moved["hits"] + moved["misses"] + moved["late"]
    ms = [statistics.median(side.seconds) * 1e3 for side in sides]
    print(f"slow tier         {links[0].label}: EMULATION")
    print(f"step, offloaded   {ms[0]:.2f} ms (median of {steps}); least {min(offloaded.seconds) * 1e3:.2f}")
    print(f"step, in memory   {ms[1]:.2f} ms (median of {steps}); least {min(memory.seconds) * 1e3:.2f}")
    print(f"exposed           {ms[0] - ms[1]:.2f} ms a step more than in memory, waits and bookkeeping")
    print(f"read              {(after['bytes_read'] - before['bytes_read']) / steps / 1e6:.2f} MB a step")
    print(f"hit rate          {moved['hits'] / asked:.3f} of {asked / steps:.0f} extents a step; {moved}")
    held, fast = after["held_bytes"], after["fast_bytes"]
    print(f"resident          {after['resident_bytes']} of fast_bytes = {fast}; serves {held / fast:.1f} x")
    ratio = ms[1] / ms[0]
    missed = " MISSED" if ratio < GOAL else ""
    print(f"speed             {ratio:.2f} of all in memory, goal >= {GOAL}{missed}")
    return ratio


def report_guesses(sides: list[Side], link: SimLink, before: dict[str, Any], steps: int) -> None:
    """Print what `spec-cache-kv` did beside a cache of everything."""
    guessed, whole = sides
    assert isinstance(guessed, GuessingSide)
    after = guessed.cache.statistics()
    ms = [statistics.median(side.seconds) * 1e3 for side in sides]
    late, fetches = (after[name] - before[name] for name in ("late", "fetches"))
    right = guessed.right[-steps:]
    print(f"slow tier         {link.label}: EMULATION")
    print(f"step, spec-cache  {ms[0]:.2f} ms (median of {steps}); least {min(guessed.seconds) * 1e3:.2f}")
    print(f"step, everything  {ms[1]:.2f} ms (median of {steps}); least {min(whole.seconds) * 1e3:.2f}")
    print(f"read              {(after['bytes_read'] - before['bytes_read']) / steps / 1e6:.2f} MB a step")
    print(f"late              {late} of {fetches} fetches; {sum(right)} of {len(right)} guesses right")
    exact, fast = whole.cache.nbytes, after["resident_bytes"]
    print(f"resident          {fast} of {exact} bytes as they are: 1/{exact / fast:.1f}")
    same = sum(a == b for a, b in zip(guessed.tokens, whole.tokens, strict=True))
    print(f"tokens            {same} of {len(whole.tokens)} the same on both sides")


def measure(options: argparse.Namespace) -> float:
    """All sides; the ratio of the speeds of the first two."""
    model: Any = resolve("smollm2").module
    layers: int = model.config.num_hidden_layers
    choosing = ",select_layers=" + "x".join(map(str, options.choose)) if options.choose else ""
    policy = f"lessismore-kv{{budget={options.budget}{choosing}}}"
    chooses = LessIsMoreKV(budget=options.budget, select_layers=tuple(options.choose)).choosing(layers)
    fast = options.tokens * TOKEN_BYTES * layers // options.share
    place = f"offload-kv{{fast_bytes={fast},prefetch={options.prefetch},extent_bytes={options.kib << 10}}}"
    sides = [
        Side(kv_cache(model, f"{place},{policy}")),
        Side(kv_cache(model, policy)),
        GuessingSide(kv_cache(model, f"spec-cache-kv{{{options.spec}}}")),
        Side(kv_cache(model)),
    ]
    links, rows_link = [CountingLink()], SimLink(UNLIMITED, 0.0)
    placement, tier = sides[0].cache.placement, sides[2].cache.placement
    assert isinstance(placement, Placement)
    assert isinstance(tier, SpecTier)
    placement.open_store = lambda _: links[0]
    tier.open_rows = lambda heads, width, dtype: LinkedRows(heads, width, dtype, rows_link)
    ids = text_ids(options.tokens)
    for side in sides:
        prefill(model, side, ids, options.tokens if isinstance(side, GuessingSide) else 256)
    turn(model, sides, options.warm)
    links[0].read_bytes.clear()
    turn(model, sides, options.warm)
    layer_seconds = statistics.median(sides[1].seconds) / layers
    read = {layer: size / options.warm for layer, size in links[0].read_bytes.items()}
    bandwidth = hideable(read, chooses, layers, layer_seconds)
    for link in (links[0], rows_link):
        link.throttle(options.share_of * bandwidth, options.latency * 1e-6)
    before = [sides[i].cache.statistics() for i in (0, 2)]
    turn(model, sides, options.steps)
    ratio = report(sides[:2], links, before[0], options.steps)
    same = sides[0].tokens == sides[1].tokens
    print(f"tokens            {'the same' if same else 'NOT the same'} on both sides")
    report_guesses(sides[2:], rows_link, before[1], options.steps)
    for side in sides:
        side.cache.close()
    return ratio


def main(argv: list[str] | None = None) -> int:
    """Print the figures; 1 when the goal is missed."""
    parser = argparse.ArgumentParser(prog="bench_offload", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="held when decode begins")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warm", type=int, default=6, help="steps before, and steps that are counted")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--spec", default="", help="options of spec-cache-kv, as bits=1,group=64")
    parser.add_argument("--choose", type=int, action="append", default=[], help="a layer; may repeat")
    parser.add_argument("--share", type=int, default=8, help="the cache over the fast tier")
    parser.add_argument("--prefetch", type=int, default=16)
    parser.add_argument("--kib", type=int, default=256, help="least size of an extent")
    parser.add_argument("--share-of", type=float, default=1.0, help="of the bandwidth that can be hidden")
    parser.add_argument("--latency", type=float, default=0.0, help="of the link, in microseconds")
    parser.add_argument("--threads", type=int, default=1, help="of the arithmetic")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        return int(measure(options) < GOAL)


if __name__ == "__main__":
    sys.exit(main())
