"""The graph verifier: what every program must satisfy between passes, as a list of named rules."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from tilewright.compiler.diagnostics import VerifyError
from tilewright.compiler.program import Program
from tilewright.compiler.regions import is_mutating
from tilewright.compiler.schema import schema_arguments

Rule = Callable[[fx.Node, Program], str | None]
"""None when the node is in order, otherwise what is wrong with it."""


def has_flat_kind(node: fx.Node, program: Program) -> str | None:
    """Programs are flat: placeholders, get_attr, calls of functions and one output."""
    return None if node.op in ("placeholder", "get_attr", "call_function", "output") else f"is a {node.op}"


def has_known_target(node: fx.Node, program: Program) -> str | None:
    """Calls go to op overloads, or to Python's arithmetic on sizes."""
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return None
    if isinstance(node.target, torch._ops.HigherOrderOperator) or getattr(node.target, "__module__", "") in (
        "_operator",
        "math",
        "torch",
        "torch._C",
        "torch.fx.experimental.symbolic_shapes",
        "torch._higher_order_ops.wrap",
    ):
        return None
    return None if node.target is operator.getitem else f"calls {node.target!r}, which is not an op overload"


def has_value(node: fx.Node, program: Program) -> str | None:
    """Every call of an aten or tilewright op knows the shape and dtype of its result."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if not node.target._schema.returns or "val" in node.meta:
        return None
    return "has no recorded value (meta['val'])"


def fits_schema(node: fx.Node, program: Program) -> str | None:
    """A call gives no more arguments than the schema takes, and no unknown name."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    names = [a[0] for a in schema_arguments(node.target)]
    if len(node.args) > len(names):
        return f"gives {len(node.args)} arguments, {node.target} takes {len(names)}"
    unknown = [k for k in node.kwargs if k not in names]
    return f"has no argument {unknown[0]!r}" if unknown else None


def reads_existing_buffer(node: fx.Node, program: Program) -> str | None:
    """A get_attr names something the module holds."""
    if node.op != "get_attr":
        return None
    owner: object = program.module
    for part in str(node.target).split("."):
        if part not in vars(owner) and not _holds(owner, part):
            return f"reads {node.target!r}, which the module does not hold"
        owner = getattr(owner, part)
    return None


def _holds(owner: object, part: str) -> bool:
    return isinstance(owner, torch.nn.Module) and (
        part in owner._buffers or part in owner._parameters or part in owner._modules
    )


def writes_only_state(node: fx.Node, program: Program) -> str | None:
    """A weight that was not declared as mutated is never written to."""
    if node.op != "call_function" or not is_mutating(node):
        return None
    schema = node.target._schema  # type: ignore[union-attr]
    for argument, value in zip(schema.arguments, node.args, strict=False):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, fx.Node) and program.is_weight(value):
            return f"writes to the weight {value.name}, which is not declared as state"
    return None


RULES: tuple[Rule, ...] = (
    has_flat_kind,
    has_known_target,
    has_value,
    fits_schema,
    reads_existing_buffer,
    writes_only_state,
)


def verify(program: Program, *, blame: str) -> None:
    """Check every rule on every node; VerifyError names the rule, the node and the pass `blame`."""
    try:
        program.graph.lint()
    except (RuntimeError, AssertionError) as error:
        raise VerifyError(f"{blame} left an ill-formed graph: {error}") from error
    placeholders = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    if placeholders != [s.name for s in program.inputs]:
        raise VerifyError(f"{blame} changed the inputs: {placeholders[:4]}... against the declared ones")
    for node in program.graph.nodes:
        for rule in RULES:
            problem = rule(node, program)
            if problem is not None:
                raise VerifyError(f"{blame} broke rule {rule.__name__}: {node.name} {problem}")


def verify_shapes(program: Program, *, blame: str) -> None:
    """Recompute each op's result on fake tensors; shape and dtype must be the recorded ones.

    Sizes that depend on data have another symbol in each computation: the ops that make them are left out.
    """
    for node in program.graph.nodes:
        if (
            node.op != "call_function"
            or not isinstance(node.target, torch._ops.OpOverload)
            or is_mutating(node)
            or torch.Tag.dynamic_output_shape in node.target.tags
        ):
            continue
        want = node.meta.get("val")
        if not isinstance(want, torch.Tensor):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        mode = getattr(want, "fake_mode", None)
        with mode if mode is not None else torch.no_grad(), torch.no_grad():
            got = node.target(*args, **kwargs)
        if str(tuple(got.shape)) != str(tuple(want.shape)) or got.dtype != want.dtype:
            raise VerifyError(
                f"{blame}: {node.name} computes {got.dtype} {tuple(got.shape)}, recorded is "
                f"{want.dtype} {tuple(want.shape)}"
            )
