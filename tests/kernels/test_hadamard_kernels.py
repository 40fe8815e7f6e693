"""The generated Hadamard kernels against the definition: sizes, dtypes, directions, strides, gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tilewright.compiler.diagnostics import ParityError
from tilewright.compiler.hadamard import base_matrix, plan_for, random_signs
from tilewright.compiler.ops import all_ops
from tilewright.compiler.parity import assert_parity, float64_evaluation
from tilewright.kernels.hadamard.family import HADAMARD
from tilewright.kernels.load import build_kernel
from tilewright.kernels.table import KernelChoice, host_target, select_for_node
from tilewright.runtime.contracts import Refusal, Target

TARGET = host_target()
pytestmark = pytest.mark.skipif(TARGET.arch == "generic", reason="kernels need AVX2")
DEFINITION = all_ops()["hadamard"].definition
BOUNDS = {
    torch.float32: {"rms": 4e-7, "ulps": 64.0},
    torch.bfloat16: {"rms": 4e-3, "ulps": 2.0},
    torch.float16: {"rms": 6e-4, "ulps": 2.0},
}


def arguments(*shape, dtype=torch.float32, signed=False, inverse=False, blocks=1):
    torch.manual_seed(3)
    size = shape[-1]
    plan = plan_for(size // blocks)
    assert plan is not None
    base = base_matrix(plan.base) if plan.base > 1 else None
    x = (2 * torch.randn(*shape)).to(dtype)
    return x, plan.block, base, random_signs(size, 1) if signed else None, inverse


def kernel(args) -> KernelChoice:
    choice = select_for_node("hadamard", args, TARGET, training=False)
    assert isinstance(choice, KernelChoice), str(choice)
    return choice


def check(args) -> None:
    choice = kernel(args)
    given, _ = choice.rewrite_args(args)
    got, want = choice.op(*given), DEFINITION(*args)
    assert got.dtype == want.dtype
    bounds = BOUNDS[args[0].dtype]
    if args[0].dtype == torch.float32:
        assert_parity(got, want, reference64=float64_evaluation(DEFINITION, args), **bounds)
    else:
        assert_parity(got, want, **bounds)


@pytest.mark.parametrize("size", [2, 12, 20, 64, 1536])
def test_sizes(size):
    check(arguments(3, size))


def test_signs_and_both_directions():
    check(arguments(1, 1, 576, signed=True))
    check(arguments(2, 576, signed=True, inverse=True))
    check(arguments(2, 12, signed=True, inverse=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(dtype):
    check(arguments(5, 576, dtype=dtype, signed=True))


def test_blocks_strides_and_no_rows():
    check(arguments(7, 9 * 64, blocks=9))
    x, *rest = arguments(1, 576, signed=True)
    check((torch.randn(576, 5, 3).permute(1, 2, 0), *rest))
    args = (torch.empty(0, 576), *rest)
    choice = kernel(args)
    assert choice.op(*choice.rewrite_args(args)[0]).shape == (0, 576)


def test_many_rows_use_threads():
    check(arguments(211, 1536))


def test_gradient_is_the_inverse():
    x, block, base, signs, _ = arguments(4, 24, signed=True)
    x = x.requires_grad_()
    choice = select_for_node("hadamard", (x, block, base, signs, False), TARGET, training=True)
    assert isinstance(choice, KernelChoice)
    want = torch.autograd.grad(DEFINITION(x, block, base, signs).square().sum(), x)[0]
    got = torch.autograd.grad(choice.op(x, base, signs).square().sum(), x)[0]
    assert_parity(got, want, rms=1e-6, ulps=64.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({0: torch.empty(2, 576, dtype=torch.float64)}, "float64"),
        ({1: 48}, "48"),
        ({2: torch.empty(36, 12)}, "must be square"),
        ({2: torch.empty(36, 36, dtype=torch.float16)}, "float32 is wanted"),
        ({3: torch.empty(12)}, "float32 is wanted"),
        ({0: torch.empty(2, 65536), 1: 65536, 2: None}, "larger than"),
    ],
)
def test_refusals(change, reason):
    args = list(arguments(2, 576))
    for place, value in change.items():
        args[place] = value
    found = select_for_node("hadamard", args, TARGET, training=False)
    assert isinstance(found, Refusal)
    assert reason in found.reason


def test_gpu_refuses_what_its_products_cannot_take():
    found = HADAMARD.configure([v.to("meta") if isinstance(v, torch.Tensor) else v for v in arguments(2, 24)],
                               Target("cuda", "sm_80"))  # fmt: skip
    assert isinstance(found, Refusal)
    assert "order 12" in found.reason


def test_a_wrong_kernel_is_noticed():
    """Another direction, forgotten signs: the bounds tell them apart."""
    args = arguments(3, 576, signed=True)
    key = kernel(args).key
    for wrong in ({"inverse": True}, {"signs": False}):
        config = tuple(sorted({**dict(key.config), **wrong}.items()))
        mutant = build_kernel(HADAMARD, dataclasses.replace(key, config=config)).op
        given = [args[0], args[2], *([args[3]] if dict(config)["signs"] else [])]
        with pytest.raises(ParityError):
            assert_parity(mutant(*given), DEFINITION(*args), **BOUNDS[torch.float32])
