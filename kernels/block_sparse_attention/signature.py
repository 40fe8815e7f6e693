"""The kernel op's arguments for a configuration: what is off is absent."""

from __future__ import annotations

from typing import Any

from tilewright.compiler.block_layout import Kind
from tilewright.kernels.common.family import config_of
from tilewright.runtime.contracts import KernelKey

INDICES = ("row_ptr", "col", "q_off", "k_off", "head_group")
OPTIONAL = ("flag", "k_valid", "q_valid", "limit", "src_q", "src_k", "mask")
RULE_FIELDS = ("before", "after", "unit", "sink", "shift")


def options_of(key: KernelKey) -> dict[str, Any]:
    """The options of a key by name; those of a layout are off where the key has none (dense, causal)."""
    return {
        "layout": "blocks",
        "descriptor": False,
        "short": False,
        **dict.fromkeys(OPTIONAL, False),
        **config_of(key),
    }


def kinds_of(key: KernelKey) -> list[Kind]:
    """The kinds of the predicates in order."""
    options = options_of(key)
    if options["layout"] != "blocks":
        return [Kind.CAUSAL] if options["layout"] == "causal" else []
    return [Kind(int(digit)) for digit in options["kinds"][1:]]


def tensor_names(key: KernelKey) -> list[str]:
    """The tensor arguments of the kernel op in order."""
    config = options_of(key)
    if config["layout"] != "blocks":
        return ["q", "k", "v"]
    return ["q", "k", "v", *INDICES, *[name for name in OPTIONAL if config[name]]]


def rule_names(key: KernelKey) -> list[str]:
    """The integer arguments: the fields of every predicate."""
    if options_of(key)["layout"] != "blocks":
        return []
    return [f"{field}{p}" for p in range(1, len(kinds_of(key)) + 1) for field in RULE_FIELDS]


def schema(key: KernelKey) -> str:
    """`(Tensor q, ..., int before1, ..., float scale) -> (Tensor, Tensor)`; dense forms return out alone."""
    given = [f"Tensor {name}" for name in tensor_names(key)] + [f"int {name}" for name in rule_names(key)]
    outputs = "(Tensor, Tensor)" if options_of(key)["layout"] == "blocks" else "Tensor"
    return f"({', '.join([*given, 'float scale'])}) -> {outputs}"


def backward_schema(key: KernelKey) -> str:
    """`(Tensor dout, Tensor? dlse, Tensor q, ..., float scale, Tensor? delta=None, ...) -> (dq, dk, dv)`.

    The last four, `row_sums` and `rows_by_key`, are computed when absent.
    """
    names = ["q", "k", "v", "out", "lse", *tensor_names(key)[3:]]
    given = [f"Tensor {name}" for name in names] + [f"int {name}" for name in rule_names(key)]
    prepared = [f"Tensor? {name}=None" for name in ("delta", "key_ptr", "key_row", "key_flag")]
    arguments = ", ".join(["Tensor dout", "Tensor? dlse", *given, "float scale", *prepared])
    return f"({arguments}) -> (Tensor, Tensor, Tensor)"
