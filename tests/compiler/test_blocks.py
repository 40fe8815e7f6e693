"""Residual streams and repeated blocks: found with and without paths, and judged rule by rule."""

from __future__ import annotations

import copy
import functools
import random
import time

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from tilewright.compiler.blocks import BlockStructure, find_blocks
from tilewright.compiler.dataflow import Flow, is_heavy
from tilewright.compiler.functionalize import functionalize
from tilewright.compiler.graph import dead_code
from tilewright.compiler.program import InputKind, InputSpec, Program
from tilewright.compiler.segments import find_period
from tilewright.frontends.capture import from_export

BATCH, TOKENS, WIDTH, HEADS = 2, 5, 12, 3


def heads(x):
    return x.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)


def attend(q, k, v):
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(-2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, states=None):
        states = x if states is None else states
        return self.o(attend(self.q(x), self.k(states), self.v(states)))


class Eager(Attention):
    """Attention as two products around a softmax; also gives the weights."""

    def forward(self, x):
        weights = torch.softmax(heads(self.q(x)) @ heads(self.k(x)).transpose(-1, -2) / 2, -1)
        return self.o((weights @ heads(self.v(x))).transpose(1, 2).flatten(-2)), weights


class Mlp(nn.Module):
    def __init__(self, act=F.gelu) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH), act

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """Pre-norm, post-norm or parallel."""

    def __init__(self, form: str = "pre", act=F.gelu) -> None:
        super().__init__()
        self.form, self.attn, self.mlp = form, Attention(), Mlp(act)
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        if self.form == "parallel":
            return x + self.attn(self.n1(x)) + self.mlp(self.n1(x))
        if self.form == "post":
            x = self.n1(x + self.attn(x))
            return self.n2(x + self.mlp(x))
        x = x + self.attn(self.n1(x))
        return x + self.mlp(self.n2(x))


class Stack(nn.Module):
    def __init__(self, blocks) -> None:
        super().__init__()
        self.embed, self.layers, self.head = nn.Linear(7, WIDTH), nn.ModuleList(blocks), nn.Linear(WIDTH, 7)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(F.layer_norm(x, (WIDTH,)))


def sample() -> torch.Tensor:
    return torch.randn(BATCH, TOKENS, 7, generator=torch.Generator().manual_seed(1))


def capture(model: nn.Module, *args) -> Program:
    """The flat graph with its inputs described, weights first as export gives them."""
    with torch.no_grad():
        exported = torch.export.export(model.eval(), args, strict=False)
    held = {**exported.state_dict, **exported.constants}
    specs, values, user = [], [], iter(args)
    for spec in exported.graph_signature.input_specs:
        weight = spec.target is not None
        specs.append(
            InputSpec(spec.arg.name, InputKind.WEIGHT if weight else InputKind.USER, spec.target or "")
        )
        values.append(held[spec.target] if weight else next(user))
    return Program(exported.graph_module, specs, values, origin="export")


@functools.cache
def captured_stack(form: str) -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    model = Stack([Block(form) for _ in range(4)])
    return model, capture(model, sample())


@functools.cache
def captured(make: type[nn.Module], *shapes: tuple[int, ...]) -> Program:
    torch.manual_seed(0)
    return capture(make(), *[torch.randn(shape) for shape in shapes])


def copied(program: Program) -> Program:
    module = fx.GraphModule(program.module, copy.deepcopy(program.graph))
    return Program(module, program.inputs, program.example_inputs, origin="export")


def stack(form: str) -> tuple[nn.Module, Program]:
    """A captured stack of four layers, the program a copy of its own."""
    model, program = captured_stack(form)
    return model, copied(program)


def found(program: Program, paths: bool = True) -> BlockStructure:
    if not paths:
        for node in program.graph.nodes:
            node.meta.pop("nn_module_stack", None)
    return find_blocks(program.graph, program.inputs)


def bypass(program: Program, structure: BlockStructure, layers: list[int]) -> int:
    """Reroute around layers, last first; returns the number of heavy ops that went."""
    before = sum(map(is_heavy, program.graph.nodes))
    for i in sorted(layers, reverse=True):
        for block in structure.layers[i].blocks:
            block.exit.replace_all_uses_with(block.entry)
    dead_code(program.graph)
    program.module.recompile()
    return before - sum(map(is_heavy, program.graph.nodes))


def run(program: Program):
    with torch.no_grad():
        out = program.module(*program.example_inputs)
    return out[0] if isinstance(out, tuple | list) else out


@pytest.mark.parametrize("paths", [True, False])
@pytest.mark.parametrize(
    ("form", "kinds"),
    [
        ("pre", ("self-attention", "mlp")),
        ("post", ("self-attention", "mlp")),
        ("parallel", ("self-attention", "mlp")),
    ],
)
def test_every_layer_of_a_stack_is_a_block(form: str, kinds: tuple[str, ...], paths: bool) -> None:
    structure = found(stack(form)[1], paths)
    assert structure.refusal == ""
    assert [b.kinds for b in structure.blocks] == [kinds] * 4
    assert [b.path for b in structure.blocks] == ([f"layers.{i}" for i in range(4)] if paths else [""] * 4)
    assert {len(b.parameters) for b in structure.blocks} == {14 if form == "parallel" else 16}
    assert all(b.typical and not b.shared and not b.live_outs and not b.coupled for b in structure.blocks)
    assert all(v.ok for b in structure.blocks for v in b.legality)
    (stream,) = structure.streams
    period = 1 if form == "parallel" else 2
    assert (stream.start, stream.period, stream.repeats) == (0, period, 4)
    for left, right in zip(structure.blocks, structure.blocks[1:], strict=False):
        assert left.exit is right.entry
        assert not set(left.nodes) & set(right.nodes)


@pytest.mark.parametrize("form", ["pre", "post", "parallel"])
@pytest.mark.parametrize("gone", [[0], [3], [1, 2], [0, 1, 2, 3]])
def test_bypassing_blocks_is_bit_equal_to_deleting_the_modules(form: str, gone: list[int]) -> None:
    model, program = stack(form)
    whole = run(program)
    heavy = bypass(program, found(program), gone)
    assert heavy == 7 * len(gone)
    kept = Stack([layer for i, layer in enumerate(model.layers) if i not in gone])
    kept.embed, kept.head = model.embed, model.head
    with torch.no_grad():
        expected = kept(sample())
    assert torch.equal(run(program), expected)
    assert not torch.allclose(whole, expected)


@pytest.mark.parametrize("paths", [True, False])
def test_a_layer_that_differs_is_a_member_but_not_typical(paths: bool) -> None:
    blocks = [Block(act=F.relu), *(Block() for _ in range(3))]
    structure = found(capture(Stack(blocks), sample()), paths)
    assert [b.typical for b in structure.blocks] == [False, True, True, True]
    assert len({b.signature for b in structure.blocks}) == 2


class Width(nn.Module):
    """Streams of unlike weights: attention layers, then one layer with another MLP width."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.blocks[2].mlp.up, self.blocks[2].mlp.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_weights_of_other_shapes_change_the_signature() -> None:
    structure = found(capture(Width(), torch.randn(BATCH, TOKENS, WIDTH)))
    assert [b.typical for b in structure.blocks] == [True, True, False]


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Block() for _ in range(2))
        self.decoder = nn.ModuleList(nn.ModuleList([Attention(), Attention(), Mlp()]) for _ in range(3))

    def forward(self, source, x):
        for layer in self.encoder:
            source = layer(source)
        for own, cross, mlp in self.decoder:
            x = x + own(F.layer_norm(x, (WIDTH,)))
            x = x + cross(F.layer_norm(x, (WIDTH,)), source)
            x = x + mlp(F.layer_norm(x, (WIDTH,)))
        return x


@pytest.mark.parametrize("paths", [True, False])
def test_encoder_and_decoder_are_two_streams(paths: bool) -> None:
    program = copied(captured(EncoderDecoder, (BATCH, 4, WIDTH), (BATCH, TOKENS, WIDTH)))
    structure = found(program, paths)
    kinds = [b.kinds for b in structure.blocks]
    assert kinds == [("self-attention", "mlp")] * 2 + [("self-attention", "cross-attention", "mlp")] * 3
    encoded = structure.blocks[1].exit
    assert all(b.shared == (encoded,) for b in structure.blocks[2:])
    assert all(v.ok for b in structure.blocks for v in b.legality)
    placed = [structure.layer_of(site.node) for site in structure.attentions]
    assert sorted(placed) == [0, 1, 2, 2, 3, 3, 4, 4]


class Joint(nn.Module):
    """Two streams that share one attention (MMDiT), then both in one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.ModuleList([Attention(), Attention(), Mlp(), Mlp()]) for _ in range(3))
        self.merged = nn.ModuleList(Block() for _ in range(2))

    def forward(self, image, text):
        for a, b, f, g in self.pairs:
            u, v = F.layer_norm(image, (WIDTH,)), F.layer_norm(text, (WIDTH,))
            q, k, w = (torch.cat((getattr(b, n)(v), getattr(a, n)(u)), 1) for n in "qkv")
            both = attend(q, k, w)
            text, image = text + b.o(both[:, :4]), image + a.o(both[:, 4:])
            image = image + f(F.layer_norm(image, (WIDTH,)))
            text = text + g(F.layer_norm(text, (WIDTH,)))
        x = torch.cat((text, image), 1)
        for block in self.merged:
            x = block(x)
        return x[:, 4:]


@pytest.mark.parametrize("paths", [True, False])
def test_coupled_streams_make_one_layer_and_only_go_together(paths: bool) -> None:
    program = copied(captured(Joint, (BATCH, TOKENS, WIDTH), (BATCH, 4, WIDTH)))
    structure = found(program, paths)
    assert [len(layer.blocks) for layer in structure.layers] == [2, 2, 2, 1, 1]
    for layer in structure.layers[:3]:
        one, other = layer.blocks
        assert one.coupled == (other.name,)
        assert other.coupled == (one.name,)
        assert not one.verdict("L5").ok
        assert other.name in one.verdict("L5").reason
        assert layer.failures() == []
    assert all(layer.blocks[0].verdict("L5").ok for layer in structure.layers[3:])
    image = program.example_inputs[-2]
    before = run(program)
    assert bypass(program, structure, [0, 1, 2, 3, 4]) > 0
    assert not torch.equal(before, image)
    assert torch.equal(run(program), image)


class Returns(nn.Module):
    """A stack that also returns what lies inside its layers."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.mlps = what, nn.ModuleList(Mlp() for _ in range(3))
        self.attns = nn.ModuleList(Eager() for _ in range(3))

    def forward(self, x):
        kept = []
        for attn, mlp in zip(self.attns, self.mlps, strict=True):
            out, weights = attn(F.layer_norm(x, (WIDTH,)))
            x = x + out
            inner = mlp.up(F.layer_norm(x, (WIDTH,)))
            x = x + mlp.down(F.gelu(inner))
            kept.append({"weights": weights, "hidden": x, "inner": inner, "nothing": x[:, :0]}[self.what])
        return (x, *kept) if self.what != "nothing" else x


def test_attention_weights_may_leave_a_block() -> None:
    structure = found(capture(Returns("weights"), torch.randn(BATCH, TOKENS, WIDTH)))
    assert len(structure.attentions) == 3
    for block in structure.blocks:
        assert [out.kind for out in block.live_outs] == ["attention weights"]
        assert block.verdict("L2").ok
        assert block.live_outs[0].node.name in block.verdict("L2").reason


def test_hidden_states_and_inner_values_may_not() -> None:
    hidden = found(capture(Returns("hidden"), torch.randn(BATCH, TOKENS, WIDTH)))
    assert [b.verdict("L3").ok for b in hidden.blocks] == [False, False, True]
    assert hidden.blocks[0].exit.name in hidden.blocks[0].verdict("L3").reason
    inner = found(capture(Returns("inner"), torch.randn(BATCH, TOKENS, WIDTH)))
    for block in inner.blocks:
        assert not block.verdict("L2").ok
        assert block.live_outs[0].node.name in block.verdict("L2").reason
    plain = found(capture(Returns("nothing"), torch.randn(BATCH, TOKENS, WIDTH)))
    assert len(plain.blocks) == 3
    assert all(v.ok for b in plain.blocks for v in b.legality)


class Cached(nn.Module):
    """Decoding with a preallocated cache that is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.attns = nn.ModuleList(Attention() for _ in range(3))
        for i in range(3):
            for name in "kv":
                self.register_buffer(f"{name}{i}", torch.zeros(1, 8, WIDTH))

    def forward(self, x, at):
        for i, attn in enumerate(self.attns):
            y = F.layer_norm(x, (WIDTH,))
            k, v = getattr(self, f"k{i}"), getattr(self, f"v{i}")
            k.index_copy_(1, at, attn.k(y))
            v.index_copy_(1, at, attn.v(y))
            x = x + attn.o(attend(attn.q(y), k, v))
        return x


def test_cache_writes_are_state_of_their_block() -> None:
    inputs = torch.randn(1, 1, WIDTH), torch.tensor([3])
    program = from_export(torch.export.export(Cached(), inputs, strict=False))
    functionalize(program.module)
    structure = found(program)
    assert [b.kinds for b in structure.blocks] == [("self-attention",)] * 3
    for i, block in enumerate(structure.blocks):
        assert [n.name for n in block.state] == [f"b_k{i}", f"b_v{i}"]
        assert [out.kind for out in block.live_outs] == ["state write"] * 2
        assert [n.name for n in block.inputs] == ["at"]
        assert all(v.ok for v in block.legality if v.rule != "L7")


def test_a_write_in_place_is_refused_by_rule_and_name() -> None:
    exported = torch.export.export(Cached(), (torch.randn(1, 1, WIDTH), torch.tensor([3])), strict=False)
    structure = find_blocks(exported.graph)
    assert len(structure.blocks) == 3
    assert not structure.blocks[0].verdict("L6").ok
    assert "index_copy_" in structure.blocks[0].verdict("L6").reason
    gm = exported.graph_module
    functionalize(gm)
    repaired = find_blocks(gm.graph)
    assert all(b.verdict("L6").ok for b in repaired.blocks)
    assert [out.kind for out in repaired.blocks[0].live_outs] == ["state write"] * 2


class Modulated(nn.Module):
    """A denoiser: gates and shifts from a sinusoidal embedding of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(8, WIDTH)
        self.mods = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(3))
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, timestep):
        angles = timestep[:, None] * torch.exp(-torch.arange(4) / 4)
        clock = F.silu(self.time(torch.cat((angles.sin(), angles.cos()), -1)))
        for mod, block in zip(self.mods, self.blocks, strict=True):
            a, b, c, d = mod(clock)[:, None].chunk(4, -1)
            x = x + a * block.attn(F.layer_norm(x, (WIDTH,)) * (1 + b))
            x = x + c * block.mlp(F.layer_norm(x, (WIDTH,)) + d)
        return x


@pytest.mark.parametrize("paths", [True, False])
def test_modulation_belongs_to_its_block_and_forbids_to_cache_blindly(paths: bool) -> None:
    program = copied(captured(Modulated, (BATCH, TOKENS, WIDTH), (BATCH,)))
    structure = found(program, paths)
    assert len(structure.blocks) == 3
    for block in structure.blocks:
        (clock,) = block.shared
        assert len(block.parameters) == 14
        assert not block.verdict("L7").ok
        assert f"{clock.name} depends on the step" in block.verdict("L7").reason
    assert all(layer.failures() == [] for layer in structure.layers)


class UNet(nn.Module):
    """Down, middle and up with long skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.shrink, self.grow = nn.Conv2d(4, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 2, 2)
        self.up = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(3))

    def forward(self, x):
        skips = [x]
        for conv in self.down:
            x = x + conv(F.silu(x))
            skips.append(x)
        x = self.grow(F.silu(self.shrink(x)))
        for conv in self.up:
            x = conv(torch.cat((x, skips.pop()), 1))
        return x


def test_a_u_net_is_refused_with_the_reason() -> None:
    structure = found(capture(UNet(), torch.randn(1, 4, 8, 8)))
    assert structure.layers == ()
    assert "no single residual stream" in structure.refusal
    assert "skip ahead" in structure.refusal


def test_models_without_streams_or_normal_form_are_refused() -> None:
    plain = found(capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4)))
    assert "no residual stream" in plain.refusal
    once = found(capture(Stack([Block()]), sample()))
    assert once.blocks == ()
    assert "no block repeats" in once.refusal


def test_a_module_graph_is_not_in_normal_form() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert "not in normal form" in find_blocks(traced.graph).refusal


def brute_force_period(row: str) -> tuple[int, int]:
    """(covered, period): most covered, then the shortest period, over every start."""
    best = (0, 0)
    for period in range(1, len(row) // 2 + 1):
        for start in range(len(row)):
            repeats = 1
            unit = row[start : start + period]
            while row[start + repeats * period : start + (repeats + 1) * period] == unit:
                repeats += 1
            if len(unit) == period and repeats >= 2 and repeats * period > best[0]:
                best = (repeats * period, period)
    return best


def test_period_is_the_best_of_all_on_random_rows() -> None:
    rng = random.Random(5)
    for _ in range(400):
        unit = [rng.choice("abc") for _ in range(rng.randint(1, 3))]
        body = unit * rng.randint(0, 4)
        row = [rng.choice("abcd") for _ in range(rng.randint(0, 3))] + body
        row += [rng.choice("abcd") for _ in range(rng.randint(0, 3))]
        start, period, repeats = find_period(row)
        covered, shortest = brute_force_period("".join(row))
        assert (period * repeats, period) == (covered, shortest), row
        assert all(row[i] == row[i + period] for i in range(start, start + covered - period))


def test_reachability_on_random_graphs() -> None:
    rng = random.Random(3)
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    parents: dict[fx.Node, set[fx.Node]] = {nodes[0]: set()}
    for _ in range(60):
        picked = [rng.choice(nodes[-8:]) for _ in range(2)]
        node = graph.call_function(torch.ops.aten.add.Tensor, tuple(picked))
        parents[node] = {a for p in picked for a in parents[p] | {p}}
        nodes.append(node)
    graph.output(nodes[-1])
    flow = Flow(graph)
    for a in nodes:
        for b in nodes:
            assert flow.reaches(a, b) == (a is b or a in parents[b])
            live = b in parents[nodes[-1]] or b is nodes[-1]
            assert bool(flow.below(a) & flow.bit(b)) == (live and a in parents[b])


def deep_graph(layers: int) -> fx.Graph:
    """Attention and MLP layers node by node, without tracing."""
    graph, aten = fx.Graph(), torch.ops.aten
    value, weight = torch.empty(2, 5, 12, device="meta"), torch.empty(12, 12, device="meta")

    def call(target, *args):
        node = graph.call_function(target, args)
        node.meta["val"] = value
        return node

    x = graph.placeholder("x")
    x.meta["val"] = value
    for i in range(layers):
        weights = [graph.placeholder(f"w{i}_{j}") for j in range(6)]
        for node in weights:
            node.meta["val"] = weight
        y = call(aten.layer_norm.default, x, [12])
        q, k, v = (call(aten.linear.default, y, w) for w in weights[:3])
        for _ in range(8):
            q, k = call(aten.mul.Tensor, q, 2.0), call(aten.neg.default, k)
        y = call(aten.scaled_dot_product_attention.default, q, k, v)
        x = call(aten.add.Tensor, x, call(aten.linear.default, y, weights[3]))
        y = call(aten.linear.default, call(aten.layer_norm.default, x, [12]), weights[4])
        x = call(aten.add.Tensor, x, call(aten.linear.default, call(aten.gelu.default, y), weights[5]))
    graph.output((x,))
    return graph


def test_a_deep_model_takes_under_a_second() -> None:
    graph = deep_graph(80)
    assert len(graph.nodes) > 2500
    started = time.process_time()
    structure = find_blocks(graph)
    seconds = time.process_time() - started
    assert [b.kinds for b in structure.blocks] == [("self-attention", "mlp")] * 80
    assert seconds < 1.0, seconds
