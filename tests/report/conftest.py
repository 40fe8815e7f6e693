"""A synthetic report of a transformer of any depth, every part filled in, with hostile names on request."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tilewright.compiler.report import Application, NodeCost, PassReport, Refused, Report, Totals

LAYER = (
    ("pow", "aten.pow.Tensor_Scalar", 0.6, "input_layernorm"),
    ("mean", "aten.mean.dim", 0.4, "input_layernorm"),
    ("add", "aten.add.Tensor", 0.1, "input_layernorm"),
    ("rsqrt", "aten.rsqrt.default", 0.1, "input_layernorm"),
    ("mul", "aten.mul.Tensor", 0.6, "input_layernorm"),
    ("q", "tilewright.linear.default", 30.0, "self_attn.q_proj"),
    ("k", "tilewright.linear.default", 10.0, "self_attn.k_proj"),
    ("v", "tilewright.linear.default", 10.0, "self_attn.v_proj"),
    ("view", "aten.view.default", 0.0, "self_attn"),
    ("rope_q", "tilewright.rope.default", 1.2, "self_attn"),
    ("rope_k", "tilewright.rope.default", 0.4, "self_attn"),
    ("attention", "tilewright.attention.default", 14.0, "self_attn"),
    ("o", "tilewright.linear.default", 30.0, "self_attn.o_proj"),
    ("residual", "aten.add.Tensor", 0.5, ""),
    ("norm", "tilewright.rms_norm.default", 0.7, "post_attention_layernorm"),
    ("gate", "tilewright.linear.default", 75.0, "mlp.gate_proj"),
    ("up", "tilewright.linear.default", 75.0, "mlp.up_proj"),
    ("silu", "aten.silu.default", 1.0, "mlp.act_fn"),
    ("mul_1", "aten.mul.Tensor", 1.0, "mlp"),
    ("down", "tilewright.linear.default", 75.0, "mlp.down_proj"),
)


def _costs(layers, source, name, fused):
    rows, previous = [], "x"
    for i in range(layers):
        for op, target, us, module in LAYER:
            if fused and op in ("pow", "mean", "add", "rsqrt", "silu"):
                continue
            kernel = "tilewright" in target and us >= 10
            where = "" if us == 0 else ("tw_gemv_avx2" if kernel and fused else "inductor")
            path = name(f"model.layers.{i}" + (f".{module}" if module else ""))
            node = name(f"rms_norm_{i}" if fused and op == "mul" else f"{op}_{i}")
            target = "tilewright.rms_norm.default" if fused and op == "mul" else target
            rows.append(
                NodeCost(
                    node, target, f"{int(us * 1e4)}*s0", f"{int(us * 2e3)}*s0 + 576", f"{int(us * 1e3)}*s0",
                    int(us > 0), us, where, source(i), path, us * 1e4 * 7, us * 3e3 * 7, "", [previous],
                )
            )  # fmt: skip
            previous = node
    return rows


def _total(rows):
    return Totals(
        sum(r.flops_value for r in rows),
        sum(r.bytes_value for r in rows),
        sum(r.launches for r in rows),
        sum(r.roofline_us for r in rows) / 1e3,
    )


def _graph(layers, name, fused):
    lines, n = ["%0 sym s0 = input", "%1 f32[1, s0, 576] = input"], 2
    for i in range(layers):
        for op, target, _, module in LAYER:
            if fused and op in ("pow", "mean", "add", "rsqrt"):
                continue
            call = "tilewright.rms_norm" if fused and op == "mul" else target.removesuffix(".default")
            where = name(f"model.layers.{i}.{module}".rstrip("."))
            lines.append(f"%{n} f32[1, s0, 576] = {call.removeprefix('aten.')}(%{n - 1}, %1)  # {where}")
            n += 1
    return "\n".join([*lines, f"return [%{n - 1}]"])


def build(layers=30, name=str, model_file=None):
    """A report whose names all went through `name`; its source lines point into `model_file`."""
    file = str(model_file or Path(__file__))

    def source(i):
        return f"{file}:{17 + i % 20}"

    rng = random.Random(7)
    before, after = _costs(layers, source, name, False), _costs(layers, source, name, True)
    norm = PassReport("match-rms-norm", "match-rms-norm", "NORMALIZE", "rounding", "arXiv:1910.07467")
    for i in range(layers):
        norm.applied.append(
            Application(
                name("scale_first"), name(f"mul_{i}"), [name(f"rms_norm_{i}")],
                [name(f"{op}_{i}") for op in ("pow", "mean", "add", "rsqrt", "mul")], source(i),
                name(f"model.layers.{i}.input_layernorm"), rng.random() * 1e-7, "",
            )
        )  # fmt: skip
    norm.refused.append(
        Refused(
            "scale_first",
            name("mul_1_0"),
            "eps is a tensor, expected a number",
            name("mul_1_0"),
            4,
            source(0),
        )
    )
    norm.seconds, norm.graph_before, norm.graph_after = (
        0.031,
        _graph(layers, name, False),
        _graph(layers, name, True),
    )
    norm.nodes_before, norm.nodes_after = len(before), len(after)
    fuse = PassReport("fuse-projections", "fuse-projections{min_width=64}", "WEIGHTS", "rounding")
    for i in range(layers):
        reason = (
            "weight k_proj is tied to another parameter" if i % 3 else "input has 2 users outside the match"
        )
        where = name(f"model.layers.{i}.self_attn")
        fuse.refused.append(
            Refused("qkv", name(f"q_{i}"), name(reason), name(f"k_{i}"), i % 3, source(i), where)
        )
    fuse.seconds, fuse.nodes_before, fuse.nodes_after = 0.012, len(after), len(after)
    fuse.notes.append("no candidate: the program has no linear_multi that starts to match")
    idle = PassReport(
        "fold-constants", "fold-constants", "NORMALIZE", "bitwise", skipped="out of fuel after 30 rewrites"
    )
    kernel = (
        "// generated: y = x W^T\n#include <immintrin.h>\nvoid tw_gemv(const float* w) {\n"
        + "  /* row */\n" * 40
        + "}\n"
    )
    return Report(
        model=name("SmolLM2-135M"), pipeline="match-rms-norm,fuse-projections{min_width=64}", origin="dynamo",
        target="cpu:avx2", device="cpu-avx2", sizes={"s0": 7}, passes=[idle, norm, fuse],
        facts=[{"name": "layer_of_attention", "value": name("attention_0: 0"), "origin": "derived: paths"}],
        graph_breaks=[{"reason": name("call to print"), "source": source(3)}],
        kernels=[
            {"node": r.node, "op": "linear", "kernel": "tw_gemv_avx2", "source": "gemv.cpp", "text": kernel}
            for r in after if r.where == "tw_gemv_avx2"
        ] + [{"node": name("at_0"), "op": "attention", "kernel": "inductor", "why": name("odd head size")}],
        costs_before=before, costs_after=after, totals_before=_total(before), totals_after=_total(after),
        errors={"eager output 0": 3.1e-7, "tilewright output 0": 2.2e-7},
        seconds={"capture": 1.2, "passes": 0.043, "lower": 0.4, "inductor": 21.0},
        versions={"torch": "2.13.0", "tilewright": "0.1"},
    )  # fmt: skip


@pytest.fixture(scope="session")
def make_report():
    return build
