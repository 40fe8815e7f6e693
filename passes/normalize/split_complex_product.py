"""Write the product of complex numbers that are read as pairs in real arithmetic.

DeepSeek-V2, Llama 4 and the reference code of Llama rotate channel pairs as complex numbers; in real
arithmetic match-rope knows them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tilewright.compiler import (
    ACCEPT,
    Exactness,
    Example,
    Match,
    Rewrite,
    Stage,
    Tensor,
    Verdict,
    refuse,
    rewrite_pass,
)

aten = torch.ops.aten


@rewrite_pass("split-complex-product", stage=Stage.NORMALIZE, exactness=Exactness.ROUNDING, trains=True)
class SplitComplexProduct(Rewrite):
    """Multiply pairs instead of complex numbers.

    rewrite:
        view_as_real(view_as_complex(x) * f)
     -> stack(x0 * re f - x1 * im f, x0 * im f + x1 * re f), with x0, x1 = x[..., 0], x[..., 1]

    Rounding alone may differ: complex products may be fused with additions where real ones are not.
    """

    inner_may_escape = True

    @staticmethod
    def pattern(x, f):
        return aten.view_as_real(aten.view_as_complex(x) * f)

    def where(self, m: Match) -> Verdict:
        if not m.is_tensor("f") or not m.dtype("f").is_complex:
            return refuse(f"the factor is {m['f']}, expected a complex tensor", at=m.root)
        return ACCEPT

    def replacement(self, x, f):
        pairs = (x, torch.view_as_real(f))
        (even, odd), (real, imaginary) = ([aten.select(t, t.dim() - 1, i) for i in (0, 1)] for t in pairs)
        product = (even * real - odd * imaginary, even * imaginary + odd * real)
        return torch.stack(product, product[0].dim())

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x, f = Tensor(2, 3, 5, 4, 2), Tensor(5, 4, dtype=torch.complex64)

        def turned(x, f):
            return torch.view_as_real(torch.view_as_complex(x) * f)

        def rotary(x, f):
            pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * f.unsqueeze(1)).flatten(3).type_as(x)

        yield {}, Example(turned, (x, f))
        yield {}, Example(lambda x, f: turned(x, f[:, :1]) + turned(x, f), (x, f), count=2)
        yield {}, Example(rotary, (Tensor(2, 3, 5, 8), Tensor(2, 5, 4, dtype=torch.complex64)))
        yield {}, Example(lambda x, f: turned(x, f[0, 0]), (x, f))
        yield {}, Example(lambda x: turned(x, 2.0), (x,), refusal="expected a complex tensor")
        yield {}, Example(lambda x, s: turned(x, s), (x, Tensor(5, 4)), refusal="expected a complex tensor")
