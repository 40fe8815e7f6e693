"""SLA: the block map, the three linear branches, their gradients, projections that belong to one variant."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tilewright.compiler import ops
from tilewright.compiler.block_layout import BlockLayout
from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.log import Fuel
from tilewright.compiler.passes_base import Example
from tilewright.compiler.pipeline import RunOptions, run_pass
from tilewright.compiler.replay import relative_rms
from tilewright.compiler.selftest import capture_example
from tilewright.passes.attention._block_search import lists
from tilewright.passes.attention._linear_branch import (
    block_classes,
    critical_count,
    feature_map,
    in_blocks,
    linear_branch,
)
from tilewright.passes.attention.sparse_linear_attention import SparseLinearAttention

GRID, TEXT, SIZE = (4, 5, 6), 5, 8
FACTS = {"video_grid": GRID, "text_segment": (0, TEXT)}
VARIANTS = ("paper", "sla1", "main")


def drawn(tokens: int, seed: int = 0, size: int = SIZE) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, tokens, size, generator=generator, dtype=torch.float64) for _ in range(3))


def projections(path, variant: str, feature: str = "softmax", size: int = SIZE, layers: int = 1) -> str:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(layers):
        tensors[f"{layer}.weight"] = torch.randn(size, size, generator=generator)
        tensors[f"{layer}.bias"] = torch.randn(size, generator=generator)
    save_file(tensors, path, metadata={"variant": variant, "feature": feature})
    return str(path)


def program_of(training: bool = False):
    example = Example(
        lambda q, k, v: ops.attention(q, k, v), drawn(120 + TEXT), facts=FACTS, training=training
    )
    return capture_example(example)


def apply(value, program):
    report = run_pass(value, program, RunOptions(verify="shapes"), Fuel())
    program.module.recompile()
    return report


def output(program, *inputs):
    out = program.module(*inputs)
    return out[0] if isinstance(out, (tuple, list)) else out


@pytest.mark.parametrize("feature", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_against_products_of_all_pairs(tmp_path, variant: str, feature: str) -> None:
    proj = projections(tmp_path / "proj.safetensors", variant, feature)
    value = SparseLinearAttention(block=16, topk=0.3, skip=0.3, variant=variant, feature=feature, proj=proj)
    ours, reference, plain = program_of(), program_of(), program_of()
    assert len(apply(value, ours).applied) == 1
    value.reference(reference)
    reference.module.recompile()
    inputs = drawn(120 + TEXT)
    want = output(reference, *inputs)
    assert relative_rms(output(ours, *inputs), want) < 1e-12
    apply(SparseLinearAttention(block=16, topk=0.3), plain)
    without = output(plain, *inputs)
    assert relative_rms(without[:, :, TEXT:], want[:, :, TEXT:]) > 1e-2, "the branch must add something"
    assert torch.equal(without[:, :, :TEXT], output(ours, *inputs)[:, :, :TEXT]), "text rows stay dense"


def test_the_variants_are_three_functions(tmp_path) -> None:
    q, k, v = drawn(128)
    found = {}
    for variant in VARIANTS:
        _, marginal = block_classes(q, k, 16, 0.3, 0.3, variant)
        found[variant] = linear_branch(q, k, v, marginal, 16, "softmax", variant)
    assert relative_rms(found["paper"], found["sla1"]) > 1e-3
    assert relative_rms(found["main"], found["sla1"]) > 1e-3


def test_the_sum_over_marginal_blocks_is_the_complement() -> None:
    """T5: all blocks less the critical ones."""
    q, k, v = drawn(100)
    critical, marginal = block_classes(q, k, 16, 0.4, 0.0, "sla1")
    fk = feature_map(k, "softmax")
    (ks, _), (vs, _) = in_blocks(fk, 16), in_blocks(v, 16)
    each = ks.transpose(-1, -2) @ vs
    total = fk.transpose(-1, -2) @ v
    picked = torch.einsum("bhij,bhjde->bhide", critical.double(), each)
    explicit = torch.einsum("bhij,bhjde->bhide", marginal.double(), each)
    assert relative_rms(total[:, :, None] - picked, explicit) < 1e-13
    (qs, _) = in_blocks(feature_map(q, "softmax"), 16)
    z = fk.sum(2)[:, :, None] - torch.einsum("bhij,bhjd->bhid", critical.double(), ks.sum(-2))
    want = (qs @ (total[:, :, None] - picked)) / (qs @ z[..., None]).clamp(min=1e-300)
    got = linear_branch(q, k, v, marginal, 16, "softmax", "sla1")
    assert relative_rms(got, want.flatten(2, 3)[:, :, :100]) < 1e-12


def test_limits() -> None:
    q, k, v = drawn(96)
    critical, marginal = block_classes(q, k, 16, 1.0, 0.0, "sla1")
    assert critical.all()
    assert not marginal.any()
    assert not linear_branch(q, k, v, marginal, 16, "softmax", "sla1").any(), "nothing marginal adds nothing"
    everything = torch.ones_like(marginal)
    fq, fk = feature_map(q, "elu"), feature_map(k, "elu")
    want = (fq @ (fk.mT @ v)) / (fq @ fk.sum(2)[..., None])
    assert relative_rms(linear_branch(q, k, v, everything, 16, "elu", "sla1"), want) < 1e-13
    assert relative_rms(linear_branch(q, k, v, everything, 16, "elu", "main"), want) < 1e-4
    assert [critical_count(t, 10) for t in (0.01, 0.05, 0.2, 0.99, 1.0)] == [1, 1, 2, 9, 10]


def test_classes_partition_each_row() -> None:
    q, k, _ = drawn(160)
    critical, marginal = block_classes(q, k, 16, 0.25, 0.3, "paper")
    assert set(critical.sum(-1).flatten().tolist()) == {2}
    assert set(marginal.sum(-1).flatten().tolist()) == {5}
    assert not (critical & marginal).any()


@pytest.mark.parametrize("variant", ["none", *VARIANTS])
def test_gradients(variant: str) -> None:
    """gradcheck in float64 of the whole: sparse part, linear branch, projection. The map is held constant."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 40, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    critical, marginal = block_classes(q, k, 8, 0.4, 0.3, variant)
    row_ptr, col, groups = lists(critical)
    dense = BlockLayout.dense(40, 40, 2, q_block=8, k_block=8)

    def attend(q, k, v, weight):
        out, _ = ops.block_sparse_attention(q, k, v, row_ptr, col, dense.q_off, dense.k_off, groups)
        if variant == "none":
            return out
        return out + linear_branch(q, k, v, marginal, 8, "softmax", variant) @ weight.T

    inputs = [t.requires_grad_() for t in (q, k, v, weight)]
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


def test_training_program_has_the_gradients_of_the_masked_one() -> None:
    ours, reference = program_of(training=True), program_of(training=True)
    value = SparseLinearAttention(block=16, topk=0.4)
    assert len(apply(value, ours).applied) == 1
    value.reference(reference)
    reference.module.recompile()
    grads = []
    for program in (ours, reference):
        inputs = [t.clone().requires_grad_() for t in drawn(120 + TEXT)]
        out = output(program, *inputs)
        grads.append(torch.autograd.grad((out * torch.arange(SIZE)).sum(), inputs))
    for ours_grad, want in zip(*grads, strict=True):
        assert relative_rms(ours_grad, want) < 1e-12


def test_a_constant_projection_cannot_be_trained(tmp_path) -> None:
    proj = projections(tmp_path / "proj.safetensors", "main")
    report = apply(SparseLinearAttention(block=16, variant="main", proj=proj), program_of(training=True))
    assert "the projection is a constant here" in report.refused[0].reason


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"variant": "main"}, "trained with variant 'sla1', asked for 'main': not exchangeable"),
        ({"feature": "relu"}, "trained with feature 'softmax', asked for 'relu'"),
        ({"size": 4}, "the heads have size 8"),
        ({"layers": 0}, "no projection for layer 0"),
    ],
)
def test_projections_of_another_kind(tmp_path, how, said) -> None:
    path = tmp_path / "proj.safetensors"
    projections(path, "sla1", size=how.pop("size", SIZE), layers=how.pop("layers", 1))
    value = SparseLinearAttention(**{"block": 16, "variant": "sla1", "proj": str(path), **how})
    with pytest.raises(OptionError, match=said):
        apply(value, program_of())


@pytest.mark.parametrize("content", [None, b"", b"not a tensor file", b"\xff" * 64])
def test_files_that_are_no_projections(tmp_path, content) -> None:
    path = tmp_path / "proj.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match="not a readable safetensors file"):
        apply(SparseLinearAttention(block=16, variant="main", proj=str(path)), program_of())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"topk": 0.0}, "more than 0"),
        ({"topk": 1.1}, "at most 1"),
        ({"skip": -0.1}, "0 to 1"),
        ({"block": 20}, "multiple of 16"),
        ({"variant": "main"}, "goes with a trained projection"),
        ({"proj": "x"}, "goes with a trained projection"),
    ],
)
def test_illegal_options(options, said) -> None:
    with pytest.raises(OptionError, match=said):
        SparseLinearAttention(**options)


def test_wan(video_program, float64_outputs) -> None:
    original, sparse, reference, whole = (video_program("wan") for _ in range(4))
    value = SparseLinearAttention(block=16, topk=0.5)
    for program, how in ((sparse, value), (whole, value.exact_limit())):
        assert len(apply(how, program).applied) == 2
    value.reference(reference)
    want, before = float64_outputs(reference)[0], float64_outputs(original)[0]
    assert relative_rms(float64_outputs(sparse)[0], want) < 1e-12
    assert relative_rms(float64_outputs(whole)[0], before) < 1e-12
    assert relative_rms(want, before) > 1e-7
