"""How many tokens to draft in a round: from what rounds have cost so far and how many drafts were kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

from tilewright.runtime.acceptance import SpeculationError

MARGIN = 0.05
"""Drafting must promise this much more speed than plain decoding."""
LOAN = 3.0
"""Plain steps' time that drafting may lose before it must wait."""
SHARE = 0.02
"""Of the time of plain steps that pays back what drafting lost."""
PROBE = 64
"""Plain steps without debt after which a drafter that did not pay is tried again."""
_REMEMBERED = 9
_WEIGHT, _DECAY = 4.0, 0.97


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens of a round, the target's own one included, when each draft is kept with this probability."""
    return sum(acceptance**i for i in range(length + 1))


class DraftLength:
    """Chooses among the allowed lengths, of which 0 (plain decoding) is always one.

    Time lost against plain decoding is a debt. While it exceeds `LOAN` plain steps nothing is drafted, and
    every plain step pays back `SHARE` of its time: a drafter that never helps costs 3 steps and 2 % from then
    on. Gains are not saved up.
    """

    def __init__(self, lengths: Sequence[int], *, prior: float = 0.7, first_is_slow: bool = False) -> None:
        """prior: acceptance before anything was seen. first_is_slow: the first call of each shape compiles
        and says nothing about its cost."""
        if not lengths or any(n < 0 for n in lengths) or len(set(lengths)) != len(lengths):
            raise SpeculationError(f"lengths = {tuple(lengths)}: expected different numbers, 0 or more")
        if not 0.0 < prior < 1.0:
            raise SpeculationError(f"prior = {prior}: expected between 0 and 1")
        self.lengths = tuple(sorted({0, *lengths}))
        self._kept, self._tried = prior * _WEIGHT, _WEIGHT
        self._first_is_slow = first_is_slow
        self._rounds: dict[int, deque[float]] = {}
        """Length -> seconds of the latest whole rounds."""
        self._seen: set[int] = set()
        self._debt = 0.0
        self._plain_steps = 0

    @property
    def acceptance(self) -> float:
        """Probability that a drafted token is kept once all before it were; recent rounds count most."""
        return self._kept / self._tried

    @property
    def debt(self) -> float:
        """Seconds that drafting has lost against plain decoding and that are not paid back."""
        return self._debt

    def cost(self, length: int) -> float | None:
        """Seconds of a round of this length, None where none was timed."""
        times = self._rounds.get(length)
        return median(times) if times else None

    def speedup(self, length: int) -> float:
        """Predicted speed of rounds of this length over plain decoding; 1 for length 0."""
        plain = self.cost(0)
        if length == 0 or plain is None:
            return 1.0
        return expected_tokens(self.acceptance, length) * plain / self._expected_cost(length, plain)

    def _expected_cost(self, length: int, plain: float) -> float:
        """Where nothing was timed: in proportion to the nearest length that was, or a guess that is kind
        enough to be tried."""
        known = self.cost(length)
        if known is not None:
            return known
        timed = [(abs(n - length), n) for n in self.lengths if n and self.cost(n) is not None]
        if not timed:
            return plain * (1.0 + 0.1 * length)
        nearest = min(timed)[1]
        extra = (self.cost(nearest) or plain) - plain
        return plain + extra * length / nearest

    def choose(self, limit: int) -> int:
        """The length of the next round, at most `limit`."""
        plain = self.cost(0)
        allowed = [n for n in self.lengths if n <= limit]
        if plain is None or self._debt > LOAN * plain:
            return 0
        best = max(allowed, key=self.speedup)
        if self.speedup(best) >= 1.0 + MARGIN:
            return best
        probe = [n for n in allowed if n]
        return probe[0] if probe and self._debt <= 0.0 and self._plain_steps >= PROBE else 0

    def observe(self, length: int, seconds: float, tokens: float, kept: int, tried: int) -> None:
        """Take in a round.

        seconds: drafting and the target's call. tokens: committed per sequence, on average. kept: drafted
        tokens that were accepted, of the `tried` that were reached (the first refused one counts).
        """
        if self._first_is_slow and length not in self._seen:
            self._seen.add(length)
            return
        self._rounds.setdefault(length, deque(maxlen=_REMEMBERED)).append(seconds)
        if tried:
            self._kept = self._kept * _DECAY + kept
            self._tried = self._tried * _DECAY + tried
        plain = self.cost(0)
        if plain is None:
            return
        if length == 0:
            self._debt = max(0.0, self._debt - SHARE * seconds)
            self._plain_steps += 1
        else:
            self._debt = max(0.0, self._debt + seconds - tokens * plain)
            self._plain_steps = 0
