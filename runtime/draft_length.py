"""How many tokens to draft in a round: from what rounds have cost so far and how many drafts were kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tilewright.runtime.acceptance import SpeculationError

MARGIN = 0.05
"""Drafting must promise this much more speed than plain decoding."""
LOAN = 3.0
"""Plain steps' time that drafting may lose before it must wait."""
CREDIT = 5.0
"""Plain steps' time that drafting may have gained and lose again: rounds of a good drafter vary."""
SHARE = 0.015
"""Of the time of plain steps that pays back what drafting lost."""
PROBE = 16
"""Plain steps without debt after which a drafter that did not pay is tried again."""
TIMED = 3
"""Plain steps that are timed before anything is drafted."""
RECHECK, SURE = 64, 2.0
"""Drafting rounds in a row after which a plain step is timed anew; four times as many where drafting seems so
many times as fast."""
STALL = 10.0
"""Plain steps' time that a round loses at most while it is the only one of its length: it may be a stall."""
_REMEMBERED = 9
_WEIGHT, _DECAY = 4.0, 0.97


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens of a round, the target's own one included, when each draft is kept with this probability."""
    return sum(acceptance**i for i in range(length + 1))


class DraftLength:
    """Chooses among the allowed lengths, of which 0 (plain decoding) is always one.

    Time lost against plain decoding is a debt. While it exceeds `LOAN` plain steps nothing is drafted, and
    every plain step pays back `SHARE` of its time: a drafter that never helps costs 3 steps and 1.5 % from
    then on. Of gains, `CREDIT` is saved up. A cost is the lower quartile of what the latest rounds took: what
    else runs on the machine only ever adds to it.
    """

    def __init__(self, lengths: Sequence[int], *, prior: float = 0.7) -> None:
        """prior: acceptance before anything was seen."""
        if not lengths or any(n < 0 for n in lengths) or len(set(lengths)) != len(lengths):
            raise SpeculationError(f"lengths = {tuple(lengths)}: expected different numbers, 0 or more")
        if not 0.0 < prior < 1.0:
            raise SpeculationError(f"prior = {prior}: expected between 0 and 1")
        self.lengths = tuple(sorted({0, *lengths}))
        self._kept, self._tried = prior * _WEIGHT, _WEIGHT
        self._of_rows: dict[int, dict[int, deque[float]]] = {}
        """Rows of a batch -> length -> seconds of the latest whole rounds."""
        self._rounds = self._of_rows.setdefault(1, {})
        self._gains: dict[int, deque[float]] = {}
        """Length -> how many plain steps the latest rounds were worth."""
        self._debt = 0.0
        self._plain_steps = self._drafting_rounds = 0
        """In a row."""

    @property
    def acceptance(self) -> float:
        """Probability that a drafted token is kept once all before it were; recent rounds count most."""
        return self._kept / self._tried

    @property
    def debt(self) -> float:
        """Seconds that drafting has lost against plain decoding and that are not paid back."""
        return max(0.0, self._debt)

    def cost(self, length: int) -> float | None:
        """Seconds of a round of this length, None where none was timed."""
        times = self._rounds.get(length)
        return sorted(times)[len(times) // 4] if times else None

    def speedup(self, length: int) -> float:
        """Predicted speed of rounds of this length over plain decoding; 1 for length 0."""
        plain = self.cost(0)
        if length == 0 or plain is None:
            return 1.0
        return self._expected_tokens(length) * plain / self._expected_cost(length, plain)

    def _expected_tokens(self, length: int) -> float:
        """What rounds of this length gave, the fewer the more mixed with what acceptance says: a tree is less
        deep than it has nodes."""
        gains = self._gains.get(length, ())
        return (_WEIGHT * expected_tokens(self.acceptance, length) + sum(gains)) / (_WEIGHT + len(gains))

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
        if plain is None or len(self._rounds[0]) < TIMED or self._debt > LOAN * plain:
            return 0
        best = max(allowed, key=self.speedup)
        if (speedup := self.speedup(best)) >= 1.0 + MARGIN:
            return 0 if self._drafting_rounds >= (RECHECK if speedup < SURE else 4 * RECHECK) else best
        probe = [n for n in allowed if n]
        if not probe or self._debt > 0.0 or self._plain_steps < PROBE:
            return 0
        self._forget(_WEIGHT)
        return probe[0]

    def begin(self, rows: int) -> None:
        """Another text, or batch of so many: costs are kept for each number of rows."""
        self._rounds = self._of_rows.setdefault(rows, {})
        self._forget(4 * _WEIGHT)

    def _forget(self, weight: float) -> None:
        """Trust what was seen of acceptance no more than so many drafts: it may be another now."""
        share = min(1.0, weight / self._tried)
        self._kept, self._tried = self._kept * share, self._tried * share
        self._gains = {n: deque(list(g)[-int(weight) :], g.maxlen) for n, g in self._gains.items()}

    def observe(self, length: int, seconds: float, tokens: float, kept: int, tried: int) -> None:
        """Take in a round that did not compile anything.

        seconds: drafting and the target's call. tokens: how far the batch got, in plain steps. kept: drafted
        tokens that were accepted, of the `tried` that were reached (the first refused one counts).
        """
        times = self._rounds.setdefault(length, deque(maxlen=_REMEMBERED))
        if length == 0 and self._drafting_rounds >= RECHECK:
            times = self._rounds[0] = deque(list(times)[1 - TIMED :], _REMEMBERED)
        times.append(seconds)
        if tried:
            self._kept = self._kept * _DECAY + kept
            self._tried = self._tried * _DECAY + tried
        self._gains.setdefault(length, deque(maxlen=2 * _REMEMBERED)).append(tokens)
        plain, usual = self.cost(0), self.cost(length)
        if plain is None or usual is None:
            return
        if length == 0:
            self._debt = max(min(0.0, self._debt), self._debt - SHARE * usual)
            self._plain_steps, self._drafting_rounds = self._plain_steps + 1, 0
        else:
            # A round that was held up by something else says little about the next.
            lost = min(seconds, 2.0 * usual) - tokens * plain
            lost = min(lost, STALL * plain) if len(times) == 1 else lost
            self._debt = max(-CREDIT * plain, self._debt + lost)
            self._plain_steps, self._drafting_rounds = 0, self._drafting_rounds + 1
