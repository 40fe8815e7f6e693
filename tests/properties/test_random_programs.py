"""Random programs through random legal pipelines of the exact passes: the results stay what they were."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from tilewright.compiler import Example, Tensor, registry
from tilewright.compiler.graph_text import print_graph
from tilewright.compiler.log import Fuel
from tilewright.compiler.pipeline import Pipeline, RunOptions, compare_float64, run_pass
from tilewright.compiler.replay import relative_rms
from tilewright.compiler.selftest import capture_example, run
from tilewright.compiler.stage import Exactness

ROWS, WIDTH, HEADS = 3, 8, 2
CACHED = 5
"""Rows of a key or value cache."""
FLOAT32_STEPS = 2048
"""Relative RMS allowed in float32, in steps of the dtype: the rounding of some twenty ops."""
NORMAL_FORM = [p.name for p in Pipeline.parse("normal-form").passes]
LATER = sorted({p.name for p in Pipeline.parse("exact").passes} | {"fold-norm-scale"})


class RandomProgram:
    """A seeded program of 5 to 25 steps over values of shape [2, ROWS, WIDTH]; called, it runs them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.inputs: list[Tensor] = [Tensor(2, ROWS, dtype=torch.int64)]
        """What steps read beside values: token ids, weights, caches."""
        kinds = [k for k in STEPS for _ in range(k[1])]
        self.steps = [self.rng.choice(kinds)[0](self) for _ in range(self.rng.randint(5, 25))]
        self.outputs = self.rng.randint(1, 2)

    def weight(self, *shape: int) -> int:
        """The place of a weight; now and then one that is used already."""
        same = [i for i, t in enumerate(self.inputs) if t.weight and t.shape == shape]
        if same and self.rng.random() < 0.15:
            return self.rng.choice(same)
        return self.add(Tensor(*shape, gain=0.6, weight=True))

    def add(self, tensor: Tensor) -> int:
        self.inputs.append(tensor)
        return len(self.inputs) - 1

    def example(self) -> Example:
        x = Tensor(2, ROWS, WIDTH, gain=1.0)
        return Example(self, (x, x, *self.inputs))

    def __call__(self, x, y, *inputs):
        values = [x, y]
        for step in self.steps:
            made = step(values, inputs)
            if made is not None:
                values.append(made)
        return tuple(values[-self.outputs :])


def pick(p: RandomProgram):
    """An index from the end: recent values are read more often."""
    return -min(1 + int(p.rng.expovariate(0.7)), 4)


def at(values, place):
    return values[max(place, -len(values))]


def linear(p):
    i, w = pick(p), p.weight(WIDTH, WIDTH)
    b = p.weight(WIDTH) if p.rng.random() < 0.4 else None
    form = p.rng.choice(["linear", "matmul", "transposed"])

    def step(v, ws):
        x, bias = at(v, i), None if b is None else ws[b]
        if form == "linear":
            return F.linear(x, ws[w], bias)
        out = x @ (ws[w].T if form == "transposed" else ws[w])
        return out if bias is None else out + bias

    return step


def rms(p):
    i, g, offset = pick(p), p.weight(WIDTH), p.rng.choice([0.0, 1.0])
    form = p.rng.choice(["rsqrt", "sqrt", "op"])

    def step(v, ws):
        x, gain = at(v, i), ws[g] + offset if offset else ws[g]
        if form == "op":
            return F.rms_norm(x, [WIDTH], gain, 1e-6)
        mean = x.pow(2).mean(-1, keepdim=True) + 1e-6
        return gain * (x * torch.rsqrt(mean) if form == "rsqrt" else x / torch.sqrt(mean))

    return step


def layer(p):
    i, g, b, written = pick(p), p.weight(WIDTH), p.weight(WIDTH), p.rng.random() < 0.5

    def step(v, ws):
        x = at(v, i)
        if not written:
            return F.layer_norm(x, [WIDTH], ws[g], ws[b], 1e-5)
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * ws[g] + ws[b]

    return step


def normed_linears(p):
    """A norm that only linear layers read: what folding and grouping look for."""
    norm, i = rms(p) if p.rng.random() < 0.6 else layer(p), p.rng.randint(1, 3)
    weights = [p.weight(WIDTH, WIDTH) for _ in range(i)]

    def step(v, ws):
        h = norm(v, ws)
        return sum((F.linear(h, ws[w]) for w in weights[1:]), F.linear(h, ws[weights[0]]))

    return step


def split(x, heads=HEADS):
    """[2, rows, heads * D] -> [2, heads, rows, D]"""
    return x.view(2, x.shape[1], heads, -1).transpose(1, 2)


def attend(p):
    """Attention written in one of its forms, as a function of q, k, v and whether it is causal."""
    fused, scale = p.rng.random() < 0.3, p.rng.choice([0.5, 0.3])

    def call(q, k, v, causal):
        if fused:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        else:
            scores = q @ k.transpose(-1, -2) * scale
            if causal:
                scores = scores.masked_fill(torch.ones(ROWS, ROWS).triu(1) > 0, float("-inf"))
            out = scores.softmax(-1) @ v
        return out.transpose(1, 2).reshape(2, ROWS, -1)

    return call


def attention(p):
    i, j, causal, call = pick(p), pick(p), p.rng.random() < 0.4, attend(p)

    def step(v, ws):
        q, k = split(at(v, i)), split(at(v, j))
        return call(q, k, k, causal)

    return step


def grouped_attention(p):
    """Four query heads over two of keys and values, repeated in one of the known spellings."""
    i, j, causal, call = pick(p), pick(p), p.rng.random() < 0.4, attend(p)
    form = p.rng.choice(["repeat", "expand", "sdpa"])

    def repeated(x):
        if form == "repeat":
            return x.repeat_interleave(2, 1)
        return x[:, :, None].expand(2, 2, 2, ROWS, 2).reshape(2, 4, ROWS, 2)

    def step(v, ws):
        q, k = split(at(v, i), 4), split(at(v, j)[..., : WIDTH // 2])
        if form == "sdpa":
            out = F.scaled_dot_product_attention(q, k, k, is_causal=causal, enable_gqa=True)
            return out.transpose(1, 2).reshape(2, ROWS, WIDTH)
        return call(q, repeated(k), repeated(k), causal)

    return step


def embedding(p):
    table, padded = p.weight(6, WIDTH), p.rng.choice([None, 2])
    return lambda v, ws: F.embedding(ws[0], ws[table], padding_idx=padded)


def rope(p):
    """Heads rotated by position, in one of the spellings, with tables given or computed from positions.

    The computed ones are no angles but exact in float32: folding them must not look like a change in float64.
    """
    i, size = pick(p), WIDTH // HEADS
    form = p.rng.choice(["half", "apart", "pairs", "stacked"])
    table = p.weight(ROWS, size // 2) if p.rng.random() < 0.4 else None

    def step(v, ws):
        x = split(at(v, i))
        if table is None:
            steps = torch.arange(ROWS).float()[:, None] * torch.arange(1, 1 + size // 2)
            cos, sin = 1 - steps * 0.125, steps * 0.25
        else:
            cos, sin = ws[table].cos(), ws[table].sin()
        if form == "half":
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
            out = x * cos + torch.cat((-x[..., size // 2 :], x[..., : size // 2]), -1) * sin
        elif form == "apart":
            a, b = x.chunk(2, -1)
            out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        elif form == "pairs":
            cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
            out = x * cos + torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2) * sin
        else:
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            out = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        return out.transpose(1, 2).reshape(2, ROWS, WIDTH)

    return step


def kv_update(p):
    """New rows written into a cache, as a value or in place, and attention over all of it."""
    i, j, call = pick(p), pick(p), attend(p)
    form, start = p.rng.choice(["copy", "in place", "slice", "scatter"]), p.rng.randint(0, CACHED - ROWS)
    place = p.add(Tensor(2, CACHED, WIDTH, gain=1.0))

    def step(v, ws):
        cache, new, rows = ws[place], at(v, j), torch.arange(start, start + ROWS)
        if form == "copy":
            cache = torch.index_copy(cache, 1, rows, new)
        elif form == "in place":
            cache.index_copy_(1, rows, new)
        elif form == "slice":
            cache = cache.clone()
            cache[:, start : start + ROWS] = new
        else:
            cache = torch.slice_scatter(cache, new, 1, start, start + ROWS)
        return call(split(at(v, i)), split(cache), split(cache), False)

    return step


def gate(p):
    i, j = pick(p), pick(p)
    act = p.rng.choice([F.silu, F.gelu, F.relu, torch.sigmoid, lambda x: x * torch.sigmoid(x)])
    return lambda v, ws: act(at(v, i)) * at(v, j)


def residual(p):
    i, j, normed = pick(p), pick(p), p.weight(WIDTH) if p.rng.random() < 0.6 else None

    def step(v, ws):
        total = at(v, i) + at(v, j)
        return total if normed is None else total * 0.5 + F.rms_norm(total, [WIDTH], ws[normed], 1e-6)

    return step


def view(p):
    i, form = pick(p), p.rng.randrange(6)
    forms = [
        lambda x: x.contiguous().view(-1, WIDTH).view(2, ROWS, WIDTH),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
        lambda x: x.flip(1) if form else x,
        lambda x: x[:, :, :4].repeat(1, 1, 2),
        lambda x: x.unsqueeze(1).expand(2, 1, ROWS, WIDTH).squeeze(1).clone(),
    ]
    return lambda v, ws: forms[form](at(v, i))


def pointwise(p):
    i, j, form, c = pick(p), pick(p), p.rng.randrange(7), p.rng.choice([0.5, 1.0, 2.0])
    forms = [
        lambda a, b: torch.tanh(a) * c,
        lambda a, b: a * c + b,
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: (a - b) * 0.5,
        lambda a, b: a.clamp(-2, 2).float(),
        lambda a, b: a * torch.sin(b),
        lambda a, b: a / (b.abs() + 1),
    ]
    return lambda v, ws: forms[form](at(v, i), at(v, j))


def constant(p):
    i = pick(p)
    return lambda v, ws: at(v, i) * (torch.arange(WIDTH) < 5).float() + torch.full((WIDTH,), 0.25)


def repeated(p):
    i = pick(p)
    return lambda v, ws: torch.tanh(at(v, i) + 1) * torch.tanh(at(v, i) + 1) + torch.tanh(at(v, i) + 1)


def dead(p):
    i = pick(p)

    def step(v, ws):
        torch.exp(at(v, i) * 2).sum()

    return step


def write(p):
    i, form = pick(p), p.rng.randrange(4)

    def step(v, ws):
        x = at(v, i).clone()
        if form == 0:
            x[:, 1] = 0.5
        elif form == 1:
            x[..., :4].mul_(2)
        elif form == 2:
            x.add_(at(v, -1))
        else:
            x.transpose(1, 2)[:, 0] += 1
        return x

    return step


STEPS = [
    (linear, 3), (rms, 2), (layer, 1), (normed_linears, 2), (attention, 2),
    (grouped_attention, 2), (embedding, 1), (rope, 2), (kv_update, 1), (gate, 2), (residual, 3),
    (view, 2), (pointwise, 3), (constant, 1), (repeated, 1), (dead, 1), (write, 1),
]  # fmt: skip


def random_pipeline(seed: int) -> Pipeline:
    """Most normal-form passes, then some others, each in a drawn order that the stages allow."""
    rng = random.Random(seed)
    first = [n for n in NORMAL_FORM if rng.random() < 0.85]
    if rng.random() < 0.3:
        rng.shuffle(first)
    rest = rng.sample(LATER, rng.randint(0, len(LATER)))
    names = first + rest
    return Pipeline.parse(",".join(sorted(names, key=lambda n: registry.find(n).stage)))


def check(seed: int, counts: dict[str, int]) -> None:
    program = capture_example(RandomProgram(seed).example(), seed=seed)
    before, pipeline = program.clone(), random_pipeline(seed)
    label = f"seed {seed}: {pipeline.text()}"
    for p in pipeline.passes:
        report = run_pass(p, program, RunOptions(verify="shapes"), Fuel())
        counts[p.name] = counts.get(p.name, 0) + len(report.applied)
    program.module.recompile()
    compare_float64(before, program, blame=label)
    for got, want in zip(run(program), run(before), strict=True):
        error = relative_rms(got, want)
        assert error <= FLOAT32_STEPS * torch.finfo(want.dtype).eps, (
            f"{label}: float32 differs by {error:.3g}"
        )
    text = print_graph(program.graph)
    for i, node in enumerate(program.graph.nodes):
        if node.op == "call_function":
            node.name = f"other_{i}"
    assert print_graph(program.graph) == text, f"{label}: the text depends on names"


def check_settled(seed: int) -> None:
    """Each pass once applied finds nothing more by itself; each pass, run again straight after itself,
    applies nothing."""
    program = capture_example(RandomProgram(seed).example(), seed=seed)
    pipeline = random_pipeline(seed)
    for p in pipeline.passes:
        run_pass(p, program, RunOptions(replay=False), Fuel())
        again = run_pass(p, program, RunOptions(replay=False), Fuel())
        assert not again.applied, f"seed {seed}: {p.name} applies again: {again.applied[0]}"


def test_passes_drawn_are_exact():
    for name in {*NORMAL_FORM, *LATER}:
        assert registry.find(name).exactness is not Exactness.APPROXIMATE


@pytest.mark.parametrize("block", range(4))
def test_random_programs(block):
    counts: dict[str, int] = {}
    for seed in range(10 * block, 10 * block + 10):
        check(seed, counts)
    assert sum(counts.values()) > 20, "the programs give the passes nothing to do"


def test_a_pass_finds_nothing_after_itself():
    for seed in range(8):
        check_settled(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4, 104))
def test_more_random_programs(block):
    for seed in range(10 * block, 10 * block + 10):
        check(seed, {})
        check_settled(seed)
