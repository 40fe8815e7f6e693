"""The rules by which drafted tokens are kept: what is kept has exactly the target's distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SpeculationError(Exception):
    """Drafted tokens and the target's answer to them do not fit together."""


def accept_greedy(drafted: Sequence[int], choices: Sequence[int]) -> list[int]:
    """The drafted tokens that the target would have chosen itself, and the target's next token.

    choices[i]: the target's choice behind the first i drafted tokens, one more than were drafted. At least
    one token is returned, at most len(choices).
    """
    if len(choices) != len(drafted) + 1:
        raise SpeculationError(f"{len(choices)} choices for {len(drafted)} drafted tokens: expected one more")
    kept = 0
    while kept < len(drafted) and drafted[kept] == choices[kept]:
        kept += 1
    return [*drafted[:kept], choices[kept]]


def accept_sampled(
    drafted: Sequence[int], drafts: Tensor | None, targets: Tensor, generator: torch.Generator | None = None
) -> list[int]:
    """As `accept_greedy` for sampling (Leviathan et al., arXiv:2211.17192, algorithm 1).

    drafts: [n, V] distributions that the tokens were drawn from; None when they are a certain choice
    (retrieval). targets: [n + 1, V], the target's distributions behind the first i tokens. Token i is kept
    with probability min(1, p / q); the first one that is not is replaced by a draw from max(p - q, 0), scaled
    to sum 1; behind the last comes a draw from p.
    """
    if len(targets) != len(drafted) + 1 or (drafts is not None and len(drafts) < len(drafted)):
        raise SpeculationError(
            f"{len(drafted)} drafted tokens, {len(targets)} distributions of the target and "
            f"{'no' if drafts is None else len(drafts)} of the draft: expected n, n + 1 and n"
        )
    for i, token in enumerate(drafted):
        p = targets[i].double()
        q = torch.zeros_like(p)
        if drafts is None:
            q[token] = 1.0
        else:
            q += drafts[i].to(p)
        u = torch.rand((), generator=generator, dtype=torch.float64, device=p.device)
        if float(u * q[token]) < float(p[token]):
            continue
        rest = (p - q).clamp(min=0.0)
        # p = q up to rounding leaves nothing over: then p itself is what is left.
        return [*drafted[:i], draw(rest if float(rest.sum()) > 0 else p, generator)]
    return [*drafted, draw(targets[-1], generator)]


def draw(weights: Tensor, generator: torch.Generator | None = None) -> int:
    """A token from weights [V], at least 0 and not all 0; they need not sum to 1."""
    if not bool(torch.isfinite(weights).all()):
        raise SpeculationError("a distribution holds NaN or infinity")
    return int(torch.multinomial(weights.double(), 1, generator=generator))
