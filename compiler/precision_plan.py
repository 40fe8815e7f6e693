"""Mixed precision: which format each linear layer gets under a budget of bytes or of error.

The error of a layer in a format is the share of its output energy that rounding the weight changes on the
calibration data, tr(D H D^T) / tr(W H W^T) with D the change of the weight and H = sum x^T x of its input. It
is measured once for every layer and format; the choice is a multiple-choice knapsack, solved exactly. Plans
are TOML files that can be read, edited and shared.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from tilewright.compiler import ops
from tilewright.compiler.calibration import Statistics, weight_path
from tilewright.compiler.diagnostics import FactError, LoadError, OptionError
from tilewright.compiler.float_format import AnyFormat, parse_format
from tilewright.compiler.program import Program
from tilewright.compiler.quantizers import weight_problem
from tilewright.compiler.schema import arguments

FORMAT = "tilewright-precision-1"
KEEP = "keep"
"""The choice that leaves a layer as it is."""
MARGIN = 0.1
"""Share of an error budget that is kept for data unlike the calibration's: on other pieces of one text, 512
tokens each, errors of SmolLM2's first layer were up to 4 % above those measured, above at all in 9 of 20."""
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Choice:
    """One format of one layer."""

    format: str
    """A `WeightFormat` or `FloatFormat` as text, or `keep`."""
    bytes: int
    """Packed size of the weight."""
    error: float
    """Share of the layer's output energy that it changes: 0 for `keep`."""


@dataclass(frozen=True)
class LayerChoices:
    """Everything one layer could get; the first choice is `keep`."""

    path: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Decision:
    """One row of the plan: layer, decision, reason."""

    path: str
    choice: Choice
    reason: str


@dataclass
class PrecisionPlan:
    """Formats by path of the weight, and what they were chosen for."""

    fingerprint: str = ""
    budget: str = ""
    layers: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The plan as TOML."""
        head = {"format": FORMAT, "fingerprint": self.fingerprint, "budget": self.budget}
        lines = [f"{key} = {json.dumps(value)}" for key, value in head.items()]
        lines += ["", "[layers]", *(f"{json.dumps(p)} = {json.dumps(f)}" for p, f in self.layers.items()), ""]
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write the plan, complete or not at all."""
        temporary = Path(path).with_name(f".{Path(path).name}.new")
        temporary.write_text(self.text(), encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> PrecisionPlan:
        """Read a plan; LoadError says what is wrong with a file that is none."""
        where = str(path)
        try:
            if Path(path).stat().st_size > _MAX_BYTES:
                raise LoadError(f"is larger than {_MAX_BYTES} bytes", where=where)
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise LoadError(f"cannot be read: {error.strerror}", where=where) from error
        except UnicodeDecodeError as error:
            raise LoadError(f"is no TOML file: {error}", where=where) from error
        return cls.parse(text, where)

    @classmethod
    def parse(cls, text: str, where: str = "plan") -> PrecisionPlan:
        """The plan of a TOML text; LoadError, placed at `where`, for any other text."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise LoadError(f"is no TOML file: {error}", where=where) from error
        layers = data.get("layers")
        if data.get("format") != FORMAT or not isinstance(layers, dict):
            raise LoadError("is no precision plan", where=where, remedy=f'it needs format = "{FORMAT}"')
        for name, choice in layers.items():
            if choice != KEEP:
                try:
                    _plannable(str(choice))
                except OptionError as error:
                    raise LoadError(f"layer {name!r}: {error.message}", where=where) from error
        return cls(str(data.get("fingerprint", "")), str(data.get("budget", "")), dict(layers))


def _plannable(text: str) -> AnyFormat:
    """The format of a text; OptionError for one that a text alone does not make."""
    form = parse_format(text)
    if form.activation == "int8-static":
        raise OptionError(f"format {text!r}: the step of static activations is no part of a plan")
    return form


def measure(
    program: Program, statistics: Statistics, formats: Sequence[str], *, skip: Sequence[str] = ()
) -> list[LayerChoices]:
    """Size and error of every format for every linear layer with a weight of its own.

    formats: texts of weight formats. skip: paths to leave out, beside layers that share their weight with an
    embedding. Raises OptionError for an unknown format, FactError for statistics without Hessians or of
    another model.
    """
    parsed = [_plannable(text) for text in formats]
    statistics.check(program)
    found: dict[str, LayerChoices] = {}
    for node in program.graph.nodes:
        if node.target is not ops.linear or not program.is_constant(arguments(node)["weight"]):
            continue
        path, weight = weight_path(program, node), arguments(node)["weight"]
        tied = any(user.target is ops.embedding for user in weight.users)
        tensor = program.tensor_of(weight)
        if path in found or path in skip or tied or weight_problem(tensor) is not None:
            continue
        hessian = statistics.layer(program, node).hessian
        if hessian is None:
            raise FactError(f"the calibration has no Hessian of {path}", remedy="calibrate with hessian=True")
        fitting = [form for form in parsed if form.problem(tensor.shape[1]) is None]
        choices = [Choice(KEEP, tensor.numel() * tensor.element_size(), 0.0)]
        choices += [_choice(form, tensor, hessian) for form in fitting]
        found[path] = LayerChoices(path, tuple(choices))
    return list(found.values())


def _choice(form: AnyFormat, weight: Tensor, hessian: Tensor) -> Choice:
    rows, columns = form.shape(*weight.shape)
    rounded = form.round_weight(weight)
    return Choice(form.text, rows * columns, output_error(weight, rounded, hessian))


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T), D = rounded - weight, [N, K] each and H [K, K]: relative output energy."""
    wide, scale = weight.double(), float(hessian.diagonal().mean())
    if scale == 0.0:
        return 0.0
    moments = hessian / scale
    change = rounded.double() - wide
    lost = float(((change @ moments) * change).sum())
    whole = float(((wide @ moments) * wide).sum())
    return lost / whole if whole > 0.0 else float("inf") if lost > 0.0 else 0.0


def choose(
    layers: Sequence[LayerChoices], *, max_bytes: int | None = None, max_error: float | None = None
) -> list[Decision]:
    """The best choice per layer: least mean error within `max_bytes`, or fewest bytes within `max_error`.

    max_error bounds the mean error over the layers. Exactly one budget is given. Raises OptionError for no or
    two budgets, and for one that no choice meets, naming the least that can be met.
    """
    if (max_bytes is None) == (max_error is None):
        raise OptionError("give either max_bytes or max_error")
    if not layers:
        raise OptionError("there are no layers to choose for")
    sizes = [[float(c.bytes) for c in layer.choices] for layer in layers]
    errors = [[c.error / len(layers) for c in layer.choices] for layer in layers]
    cost, weight = (errors, sizes) if max_bytes is not None else (sizes, errors)
    limit = float(max_bytes) if max_bytes is not None else float(max_error or 0.0)
    least = sum(min(row) for row in weight)
    if least > limit:
        name = "max_bytes" if max_bytes is not None else "max_error"
        raise OptionError(f"{name} = {limit:g}: no choice of formats meets it, the least is {least:g}")
    picked = _knapsack(cost, weight, limit)
    return [_decision(layer, layer.choices[i]) for layer, i in zip(layers, picked, strict=True)]


def _knapsack(cost: list[list[float]], weight: list[list[float]], limit: float) -> list[int]:
    """One choice per row with the least total cost within `limit` of total weight, by integer programming."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    lengths = [len(row) for row in cost]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    flat_cost, flat_weight = (np.array([v for row in table for v in row]) for table in (cost, weight))
    one_each = np.zeros((len(lengths), starts[-1]))
    for i, length in enumerate(lengths):
        one_each[i, starts[i] : starts[i] + length] = 1.0
    scale = limit if limit > 0.0 else 1.0
    constraints = [
        LinearConstraint(one_each, 1.0, 1.0),
        LinearConstraint(flat_weight[None, :] / scale, -np.inf, limit / scale),
    ]
    top = float(flat_cost.max()) or 1.0
    solved = milp(
        flat_cost / top, constraints=constraints, integrality=np.ones(starts[-1]), bounds=Bounds(0.0, 1.0)
    )
    if solved.x is None:
        raise OptionError(f"the knapsack was not solved: {solved.message}")
    picked = [int(np.argmax(solved.x[starts[i] : starts[i + 1]])) for i in range(len(lengths))]
    # The solver's tolerance may step over the limit by a hair: take the lighter choices until it holds.
    while sum(row[i] for row, i in zip(weight, picked, strict=True)) > limit:
        heaviest = max(range(len(picked)), key=lambda k: weight[k][picked[k]] - min(weight[k]))
        picked[heaviest] = int(np.argmin(weight[heaviest]))
    return picked


def _decision(layer: LayerChoices, choice: Choice) -> Decision:
    smaller = [c for c in layer.choices if c.bytes < choice.bytes]
    reason = f"error {choice.error:.3g} in {choice.bytes} bytes"
    if smaller:
        following = max(smaller, key=lambda c: c.bytes)
        reason += f"; {following.format} would be {following.error:.3g} in {following.bytes}"
    return Decision(layer.path, choice, reason)


def plan_of(decisions: Sequence[Decision], *, fingerprint: str, budget: str) -> PrecisionPlan:
    """The plan that a list of decisions makes."""
    return PrecisionPlan(fingerprint, budget, {d.path: d.choice.format for d in decisions})
