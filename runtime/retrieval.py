"""Drafts without a model: what followed the same words before, in the text itself or in a datastore."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from tilewright.runtime.acceptance import SpeculationError

_LATEST = 32
"""Occurrences of one key that are compared, the latest ones."""


class NgramStore:
    """Texts of tokens, found again by how they end: prompt lookup and REST (arXiv:2311.08252) in one.

    A text may grow. Only continuations that exist are indexed, so a text never finds its own end.
    """

    def __init__(self, texts: Iterable[Sequence[int]] = (), *, shortest: int = 2, longest: int = 16) -> None:
        """shortest, longest: how many tokens must, and may, be compared."""
        if not 1 <= shortest <= longest:
            raise SpeculationError(
                f"shortest = {shortest}, longest = {longest}: expected 1 <= shortest <= longest"
            )
        self.shortest, self.longest = shortest, longest
        self._texts: list[list[int]] = []
        self._ends: defaultdict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        """The last `shortest` tokens -> (text, place of the token that follows them)."""
        for text in texts:
            self.add(text)

    def add(self, tokens: Sequence[int] = ()) -> int:
        """A new text; returns its number."""
        self._texts.append([])
        self.extend(len(self._texts) - 1, tokens)
        return len(self._texts) - 1

    def extend(self, text: int, tokens: Sequence[int]) -> None:
        """Tokens that a text goes on with."""
        held = self._texts[text]
        for token in tokens:
            if len(held) >= self.shortest:
                self._ends[tuple(held[-self.shortest :])].append((text, len(held)))
            held.append(int(token))

    def matches(self, context: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
        """(tokens that agree, the places that follow them), for the longest agreement with the end of
        `context`; latest first."""
        if len(context) < self.shortest:
            return 0, []
        best, found = 0, list[tuple[int, int]]()
        key = tuple(int(t) for t in context[-self.shortest :])
        for text, place in reversed(self._ends.get(key, [])[-_LATEST:]):
            held, size = self._texts[text], self.shortest
            most = min(self.longest, place, len(context))
            while size < most and held[place - size - 1] == context[-size - 1]:
                size += 1
            if size > best:
                best, found = size, []
            if size == best:
                found.append((text, place))
        return best, found

    def propose(self, context: Sequence[int], count: int) -> tuple[int, list[int]]:
        """(tokens that agree, up to `count` tokens that followed): at each step the most frequent of the
        continuations that still agree, the latest of equally frequent ones."""
        size, places = self.matches(context)
        tokens: list[int] = []
        while places and len(tokens) < count:
            held = [(self._texts[t][p], (t, p)) for t, p in places if p < len(self._texts[t])]
            if not held:
                break
            chosen = Counter(token for token, _ in held).most_common(1)[0][0]
            tokens.append(chosen)
            places = [(t, p + 1) for token, (t, p) in held if token == chosen]
        return size, tokens

    def continuations(self, context: Sequence[int], count: int) -> tuple[int, list[list[int]]]:
        """(tokens that agree, up to `count` tokens behind each place that agrees so far, latest first)."""
        size, places = self.matches(context)
        return size, [self._texts[text][place : place + count] for text, place in places]
