"""Costs against torch's own counter, against a capture with fixed sizes, and against arithmetic by hand."""

from __future__ import annotations

import time

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from tilewright.compiler import ops
from tilewright.compiler.cost import (
    DEVICES,
    device_named,
    measure_host,
    node_cost,
    node_costs,
    roofline_us,
    size_values,
    totals,
)
from tilewright.compiler.diagnostics import OptionError

CPU = DEVICES["cpu-avx2"]


def captured(fn, *args, mode="fake"):
    return make_fx(fn, tracing_mode=mode, pre_dispatch=True)(*args)


def only(module, name):
    """The cost of the one node whose op has that name."""
    found = [n for n in module.graph.nodes if n.op == "call_function" and name in str(n.target)]
    assert len(found) == 1, found
    return node_cost(found[0])


def rows_of(module):
    return node_costs(module, CPU, lambda node: "inductor")


PRODUCTS = {
    "linear": (F.linear, [(5, 7, 24), (40, 24), (40,)]),
    "matmul": (torch.matmul, [(3, 5, 7), (3, 7, 11)]),
    "mm": (torch.mm, [(5, 7), (7, 11)]),
    "bmm": (torch.bmm, [(3, 5, 7), (3, 7, 11)]),
    "addmm": (torch.addmm, [(11,), (5, 7), (7, 11)]),
    "conv1d": (F.conv1d, [(2, 6, 19), (8, 6, 3)]),
    "conv2d": (lambda x, w: F.conv2d(x, w, stride=2, groups=3), [(2, 6, 19, 17), (9, 2, 3, 5)]),
    "conv3d": (lambda x, w: F.conv3d(x, w, padding=1), [(1, 4, 5, 6, 7), (8, 4, 3, 3, 3)]),
    "conv_transpose2d": (F.conv_transpose2d, [(2, 6, 5, 7), (6, 4, 3, 3)]),
    "einsum": (lambda x, y: torch.einsum("bhsd,bhtd->bhst", x, y), [(2, 3, 5, 8), (2, 3, 7, 8)]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_count_what_torch_counts(name):
    fn, shapes = PRODUCTS[name]
    args = [torch.randn(s) for s in shapes]
    with FlopCounterMode(display=False) as counter:
        fn(*args)
    counted = sum(r.flops_value for r in rows_of(captured(fn, *args)))
    assert counted == counter.get_total_flops() > 0


def test_attention_counts_both_products_and_a_softmax():
    q, k = torch.randn(2, 6, 5, 16), torch.randn(2, 6, 9, 16)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        F.scaled_dot_product_attention(q, k, k)
    cost = only(captured(F.scaled_dot_product_attention, q, k, k), "scaled_dot_product_attention")
    assert cost.flops == counter.get_total_flops() + 5 * 2 * 6 * 5 * 9


class Block(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.norm = nn.RMSNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        q = q * torch.cos(q) + torch.cat((-q[..., 4:], q[..., :4]), -1)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.out(a)
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x + self.down(F.silu(self.up(h)))


def test_formulas_give_the_numbers_of_every_static_capture():
    model = Block().eval()
    dynamic = export(model, (torch.randn(3, 7, 32),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    formulas = {r.node: r for r in rows_of(dynamic.graph_module)}
    b, s = (str(d) for d in next(n for n in dynamic.graph.nodes if n.name == "x").meta["val"].shape[:2])
    assert any(b in r.flops and s in r.flops for r in formulas.values())
    for sizes in ((2, 5), (4, 33), (7, 6)):
        fixed = rows_of(export(model, (torch.randn(*sizes, 32),)).graph_module)
        assert [r.node for r in fixed] == [n for n in formulas if not n.startswith("sym_size")]
        for row in fixed:
            for name in ("flops", "bytes_read", "bytes_written"):
                text = getattr(formulas[row.node], name)
                assert int(sympy.sympify(text).subs({b: sizes[0], s: sizes[1]})) == int(getattr(row, name)), (
                    row.node,
                    name,
                )


def test_captured_sizes_are_where_the_numbers_are_taken():
    dynamic = export(Block().eval(), (torch.randn(3, 7, 32),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    assert sorted(size_values(dynamic.graph_module).values()) == [3, 7]
    fixed = export(Block().eval(), (torch.randn(3, 7, 32),))
    a, b = totals(rows_of(dynamic.graph_module)), totals(rows_of(fixed.graph_module))
    assert (a.flops, a.bytes, a.launches, a.unknown) == (b.flops, b.bytes, b.launches, 0)


def test_costing_adds_no_guard():
    dynamic = export(Block().eval(), (torch.randn(3, 7, 32),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    env = next(n for n in dynamic.graph.nodes if n.name == "x").meta["val"].shape[0].node.shape_env
    before = len(env.guards)
    rows_of(dynamic.graph_module)
    assert len(env.guards) == before


@pytest.mark.parametrize(
    ("fn", "moves"),
    [
        (lambda x: x.transpose(0, 1), False),
        (lambda x: x.reshape(-1), False),
        (lambda x: x.transpose(0, 1).reshape(-1), True),
        (lambda x: x.contiguous(), False),
        (lambda x: x.t().contiguous(), True),
        (lambda x: x.to(torch.float32), False),
        (lambda x: x.to(torch.float64), True),
        (lambda x: x[:, 2:4], False),
        (lambda x: x.expand(3, 6, 8), False),
        (lambda x: x.clone(), True),
        (lambda x: torch.cat((x, x)), True),
    ],
)
def test_a_view_is_free_and_a_copy_is_not(fn, moves):
    total = totals(rows_of(captured(fn, torch.randn(6, 8))))
    assert (total.launches > 0, total.bytes > 0) == (moves, moves)
    assert total.flops == 0


def test_bytes_by_hand():
    x = torch.randn(6, 8)
    add = only(captured(lambda x, y: x + y, x, torch.randn(8)), "add")
    assert (add.flops, add.bytes_read, add.bytes_written, add.launches) == (48, 48 * 4 + 8 * 4, 48 * 4, 1)
    copy = only(captured(lambda x: x.expand(3, 6, 8).contiguous(), x), "contiguous")
    assert (copy.bytes_read, copy.bytes_written) == (48 * 4, 3 * 48 * 4)
    fill = only(captured(lambda x: torch.zeros_like(x), x), "zeros_like")
    assert (fill.bytes_read, fill.bytes_written) == (0, 48 * 4)
    table, picked = torch.randn(1000, 16), torch.arange(5)
    look_up = only(captured(lambda i, w: F.embedding(i, w), picked, table), "embedding")
    assert (look_up.bytes_read, look_up.bytes_written) == (5 * 8 + 5 * 16 * 4, 5 * 16 * 4)


def test_writing_into_a_cache_moves_the_new_rows_only():
    cache, new, at = torch.randn(1, 2, 64, 16), torch.randn(1, 2, 3, 16), torch.arange(3)
    for fn in (lambda c, n, p: ops.kv_update(c, n, p, 2), lambda c, n, p: c.index_copy(2, p, n)):
        cost = rows_of(captured(fn, cache, new, at))[-1]
        assert (int(cost.bytes_read), int(cost.bytes_written)) == (new.nbytes + at.nbytes, new.nbytes)
    kept = rows_of(captured(lambda c, n, p: c.index_copy(2, p, n) + c.sum(), cache, new, at))[0]
    assert int(kept.bytes_written) == cache.nbytes


def test_a_semantic_op_counts_as_much_as_what_it_stands_for():
    g, u = torch.randn(4, 32), torch.randn(4, 32)
    plain = totals(rows_of(captured(lambda g, u: F.silu(g) * u, g, u)))
    raised = totals(rows_of(captured(lambda g, u: ops.gated_mlp(g, u, "silu"), g, u)))
    assert plain.flops == raised.flops == 6 * 4 * 32
    assert (plain.launches, raised.launches) == (2, 1)
    assert plain.bytes - raised.bytes == 2 * g.nbytes
    x, w = torch.randn(5, 24), torch.randn(40, 24)
    assert only(captured(F.linear, x, w), "linear") == only(
        captured(lambda x, w: ops.linear(x, w), x, w), "linear"
    )


def test_what_is_not_known_is_said():
    cost = only(captured(lambda x: torch.sort(x)[0], torch.randn(6, 8)), "sort")
    assert cost.flops == 0
    assert "sort" in cost.note
    assert cost.bytes_written == 48 * (4 + 8)


def test_a_size_without_a_value_keeps_its_formula_and_has_no_number():
    class Picks(nn.Module):
        def forward(self, x):
            return x[x > 0] * 2

    rows = rows_of(export(Picks(), (torch.randn(6, 8),)).graph_module)
    last = rows[-1]
    assert last.flops.startswith("u")
    assert (last.flops_value, last.roofline_us) == (None, None)
    assert totals(rows).unknown >= 1


def test_roofline_by_hand():
    device = DEVICES["h100"]
    assert roofline_us(989.4e12, 0, 0, "bfloat16", device) == pytest.approx(1e6)
    assert roofline_us(1, 3350e9, 0, "bfloat16", device) == pytest.approx(1e6)
    assert roofline_us(0, 0, 4, "bfloat16", device) == 4 * device.launch_us
    assert roofline_us(67e12, 0, 0, "int64", device) == pytest.approx(1e6)


def test_devices_by_name_and_architecture():
    assert device_named("sm_90") is DEVICES["h100"]
    assert device_named("gfx942") is DEVICES["mi300x"]
    for device in DEVICES.values():
        assert device.peak_flops["float32"] > 0
        assert device.memory_bytes > 1e9
    with pytest.raises(OptionError, match="device 'h1000' is unknown .*'h100'"):
        device_named("h1000")


def test_this_machine_is_measured_quickly():
    start = time.perf_counter()
    host = measure_host()
    assert time.perf_counter() - start < 2.0  # 0.1 s alone; other work may share the cores
    assert 1e8 < host.peak_flops["float32"] < 1e14
    assert 0.1 < host.bandwidth_gbs < 2000
    assert 0 < host.launch_us < 1000


def deep(block, times):
    """One graph that runs a captured block many times in a row."""
    graph, placed = fx.Graph(), {}
    for node in block.graph.nodes:
        if node.op == "placeholder":
            placed[node] = graph.node_copy(node)
    x = next(n for n in placed if n.name == "x")
    for _ in range(times):
        result = graph.graph_copy(block.graph, inner := dict(placed))
        placed[x] = result[0] if isinstance(result, tuple) else result
        assert len(inner) > len(placed)
    graph.output(placed[x])
    return fx.GraphModule({}, graph)


def test_a_deep_dynamic_graph_is_costed_in_time():
    block = export(Block().eval(), (torch.randn(2, 9, 32),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    module = deep(block.graph_module, 80)
    assert len(module.graph.nodes) > 2500
    start = time.process_time()
    rows = rows_of(module)
    assert time.process_time() - start < 1.5
    assert totals(rows).unknown == 0
    one = totals(rows_of(block.graph_module))
    assert totals(rows).flops == 80 * one.flops
