"""The arguments of the paged kernels for a configuration: what is absent is not in the schema."""

from __future__ import annotations

from typing import Any

from tilewright.kernels.common.family import config_of
from tilewright.runtime.contracts import KernelKey

ATTENTION = ("q", "k_pages", "v_pages", "page_table", "lengths")
APPEND = ("k_pages", "v_pages", "page_table", "starts", "k", "v")
BOUNDS = ("q", "low", "high", "page_table", "lengths")


def entries_of(key: KernelKey) -> str:
    """What an attention runs over: all, picked (pages) or tokens."""
    if key.op == "token_attention":
        return "tokens"
    return "picked" if config_of(key).get("picked") else "all"


def is_packed(key: KernelKey) -> bool:
    """Whether the rows of the pool are codes of a few bits."""
    return "bits" in config_of(key)


def attention_names(key: KernelKey) -> list[str]:
    """The tensor arguments of an attention kernel in order."""
    listed = {"all": [], "picked": ["picked"], "tokens": ["positions"]}[entries_of(key)]
    return [*ATTENTION, *listed, *(["first"] if config_of(key)["first"] else [])]


def attention_schema(key: KernelKey) -> str:
    """`(Tensor q, ..., float scale) -> (Tensor, Tensor)`."""
    given = [f"Tensor {name}" for name in attention_names(key)]
    return f"({', '.join([*given, 'float scale'])}) -> (Tensor, Tensor)"


def append_names(key: KernelKey) -> list[str]:
    """The tensor arguments of an append kernel in order."""
    return [*APPEND, *(["low", "high"] if config_of(key).get("planes") else [])]


def append_schema(key: KernelKey) -> str:
    """`(Tensor(a!) k_pages, ...) -> ()`."""
    written = dict(zip(("k_pages", "v_pages", "low", "high"), "abcd", strict=True))
    given = [
        f"Tensor({written[name]}!) {name}" if name in written else f"Tensor {name}"
        for name in append_names(key)
    ]
    return f"({', '.join(given)}) -> ()"


def bounds_names(key: KernelKey) -> list[str]:
    """The tensor arguments of a bounds kernel in order."""
    return [*BOUNDS, *(["first"] if config_of(key)["first"] else [])]


def bounds_schema(key: KernelKey) -> str:
    """`(Tensor q, ...) -> Tensor`."""
    return f"({', '.join(f'Tensor {name}' for name in bounds_names(key))}) -> Tensor"


def pick_schema(key: KernelKey) -> str:
    """`(Tensor q, ..., int count) -> Tensor`."""
    return f"({', '.join(f'Tensor {name}' for name in bounds_names(key))}, int count) -> Tensor"


def mass_schema(key: KernelKey) -> str:
    """`(Tensor q, Tensor k, Tensor lse, [Tensor first,] float scale) -> Tensor`."""
    names = ["q", "k", "lse", *(["first"] if config_of(key)["first"] else [])]
    return f"({', '.join([*(f'Tensor {name}' for name in names), 'float scale'])}) -> Tensor"


def present(names: list[str], given: dict[str, Any]) -> list[Any]:
    """The values of the named arguments."""
    return [given[name] for name in names]


ROTATE = ("rows", "offsets", "pace")
SINE = (1.5707963705062866, -0.6459634900093079, 0.07968003302812576, -0.00460165785625577)
"""sin(pi r / 2) is r times this polynomial of r^2 for |r| <= 1/2, within 3.3e-9."""
COSINE = (-1.2337005138397217, 0.25366923213005066, -0.02086016535758972, 0.0009037665440700948)
"""cos(pi r / 2) is 1 and r^2 times this polynomial of r^2, within 1e-10."""


def polynomial(terms: tuple[float, ...], suffix: str) -> str:
    """Its value at z, as an expression of Triton or, with suffix f, of C++."""
    text = f"{terms[-1]}{suffix}"
    for term in reversed(terms[:-1]):
        text = f"({text} * z + {term}{suffix})"
    return text


def rotate_names(key: KernelKey) -> list[str]:
    """The tensor arguments of a rotation kernel in order."""
    return [*ROTATE, *(["page_table"] if config_of(key)["page"] else [])]


def rotate_schema(key: KernelKey) -> str:
    """`(Tensor rows, Tensor offsets, Tensor pace[, Tensor page_table]) -> Tensor`."""
    return f"({', '.join(f'Tensor {name}' for name in rotate_names(key))}) -> Tensor"
