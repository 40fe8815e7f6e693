"""Random programs with views and writes: the normal form gives the same bits and leaves the same inputs."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from tilewright.compiler.canonicalize import canonicalize
from tilewright.compiler.functionalize import functionalize
from tilewright.compiler.graph import is_op, mutates, print_graph

aten = torch.ops.aten


def capture(fn, *inputs) -> fx.GraphModule:
    with torch.no_grad():
        return make_fx(fn, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


def fresh(inputs):
    """The same values in other memory with the same strides."""
    return [torch.empty_strided(t.size(), t.stride(), dtype=t.dtype).copy_(t) for t in inputs]


def bits(value: torch.Tensor) -> tuple:
    return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()


def run(fn, inputs):
    given = fresh(inputs)
    with torch.no_grad():
        results = fn(*given)
    results = results if isinstance(results, list | tuple) else [results]
    return [bits(r) for r in results], [bits(g) for g in given]


def writes(gm: fx.GraphModule) -> list[fx.Node]:
    """Writes left in a graph, without the write-backs to inputs."""
    back = [n for n in gm.graph.nodes if is_op(n, aten.copy_.default) and n.args[0].op == "placeholder"]
    return [n for n in gm.graph.nodes if n.op == "call_function" and mutates(n) and n not in back]


class RandomProgram:
    """A seeded straight-line program with views and writes, built by running it: every step is legal."""

    def __init__(self, seed: int, length: int = 14) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        shapes = [(4, 6), (2, 3, 4), (6,)]
        self.inputs = [torch.randn(s) for s in self.rng.sample(shapes, 2)]
        if self.rng.random() < 0.5:
            self.inputs[0] = torch.randn(5, 4).t()
        self.inputs.append(torch.randint(0, 9, (4,)))
        self.steps = []
        values = fresh(self.inputs)
        while len(self.steps) < length:
            step = self.propose(values)
            trial = copy.deepcopy(values)
            try:
                with torch.no_grad():
                    made = step(trial)
            except (RuntimeError, IndexError, NotImplementedError, ValueError):
                continue
            if any(v.numel() == 0 or v.numel() > 400 or v.dim() > 5 for v in made):
                continue
            self.steps.append(step)
            with torch.no_grad():
                values += step(values)
        picks = range(len(self.inputs), len(values))
        self.returned = sorted(self.rng.sample(list(picks), min(3, len(picks)))) if len(picks) else [0]

    def __call__(self, *inputs):
        values = list(inputs)
        for step in self.steps:
            values += step(values)
        return [values[i] for i in self.returned]

    def propose(self, values):
        r = self.rng
        i, j = r.randrange(len(values)), r.randrange(len(values))
        kind = r.choices([self.view, self.write, self.make], weights=[4, 5, 2])[0]
        return kind(values, i, j)

    def view(self, values, i, _):
        r, n = self.rng, values[i].dim()
        d = r.randrange(-n, n) if n else 0
        e = r.randrange(-n, n) if n else 0
        size = values[i].shape[d] if n else 1
        a, b, s = r.randrange(size), r.randrange(1, size + 2), r.choice([1, 1, 2, 3])
        forms = [
            lambda v: [v[i].narrow(d, a, 1)],
            lambda v: [torch.ops.aten.slice.Tensor(v[i], d, a, b if b > a else None, s)],
            lambda v: [torch.ops.aten.slice.Tensor(v[i], d, a - size, 2**63 - 1, s)],
            lambda v: [v[i].select(d, a)],
            lambda v: [v[i].transpose(d, e)],
            lambda v: [v[i].movedim(d, e)],
            lambda v: [v[i].permute(list(reversed(range(n))))],
            lambda v: [v[i].unsqueeze(d)],
            lambda v: [v[i].squeeze()],
            lambda v: [v[i].reshape(-1)],
            lambda v: [v[i].view(-1)],
            lambda v: [v[i].unflatten(d, (-1, 2))],
            lambda v: [v[i].flatten(0, -1)],
            lambda v: [v[i].expand(2, *v[i].shape)],
            lambda v: [v[i].expand_as(v[i])],
            lambda v: [torch.diagonal(v[i], 0, d, e)],
            lambda v: list(v[i].chunk(2, d)),
            lambda v: list(v[i].split([a, size - a], d)),
            lambda v: [v[i].unbind(d)[a]],
            lambda v: [v[i].contiguous()],
            lambda v: [v[i].to(torch.float32)],
            lambda v: [v[i].detach()],
            lambda v: [v[i].type_as(v[0])],
            lambda v: [torch.dropout(v[i], 0.3, False)],
            lambda v: [v[i].view_as(v[i])],
        ]
        return r.choice(forms)

    def write(self, values, i, j):
        r = self.rng
        c = r.choice([0.0, 1.0, 0.5, -2.0, 3])
        m = r.randrange(max(values[i].shape[0], 1)) if values[i].dim() else 0
        index = torch.tensor([m])
        forms = [
            lambda v: [v[i].add_(c)],
            lambda v: [v[i].add_(v[j])],
            lambda v: [v[i].sub_(v[j], alpha=2)],
            lambda v: [v[i].mul_(c)],
            lambda v: [v[i].copy_(v[j])],
            lambda v: [v[i].copy_(v[j].sum())],
            lambda v: [v[i].fill_(c)],
            lambda v: [v[i].zero_()],
            lambda v: [v[i].neg_()],
            lambda v: [v[i].clamp_(-1, 1)],
            lambda v: [v[i].masked_fill_(v[i] > 0, c)],
            lambda v: [v[i].relu_()],
            lambda v: [v[i].index_copy_(0, index, v[i][:1] + 1)],
            lambda v: [v[i].index_fill_(0, index, c)],
            lambda v: (v[i].__setitem__(m, c), [])[1],
            lambda v: (v[i].__setitem__(slice(None, None, 2), v[j].sum()), [])[1],
            lambda v: (v[i].__setitem__((..., 0), v[i][..., -1]), [])[1],
            lambda v: [torch.add(v[i], 1, out=v[j])] if v[i].shape == v[j].shape else [1 // 0],
        ]
        picked = r.choice(forms)
        if picked is forms[-1] and (values[i].shape != values[j].shape or values[i].dtype != values[j].dtype):
            picked = forms[0]
        return picked

    def make(self, values, i, j):
        r = self.rng
        forms = [
            lambda v: [v[i].clone()],
            lambda v: [v[i] + 1],
            lambda v: [v[i] * v[j]],
            lambda v: [torch.cat([v[i].reshape(-1), v[j].reshape(-1).to(v[i].dtype)])],
            lambda v: [v[i].float().sum(-1)],
            lambda v: [torch.zeros_like(v[i])],
            lambda v: [torch.full((3, 2), 0.5)],
            lambda v: [torch.where(v[i] > 0, v[i], 0)],
            lambda v: [v[i].repeat(2, *[1] * v[i].dim())],
        ]
        return r.choice(forms)


def check_block(seeds) -> None:
    refused = 0
    for seed in seeds:
        program = RandomProgram(seed)
        expected = run(program, program.inputs)
        gm = capture(program, *fresh(program.inputs))
        assert run(gm, program.inputs) == expected, f"seed {seed}: the capture itself differs"
        result = functionalize(gm)
        gm.graph.lint()
        assert run(gm, program.inputs) == expected, f"seed {seed}\n{print_graph(gm.graph)}"
        kept = [why for _, why in result.refused]
        assert all("expanded view" in why for why in kept), f"seed {seed}: {kept}"
        assert kept or not writes(gm), f"seed {seed}\n{print_graph(gm.graph)}"
        refused += bool(kept)
        before = print_graph(gm.graph)
        canonicalize(gm)
        gm.graph.lint()
        assert run(gm, program.inputs) == expected, f"seed {seed}\n{before}\n\n{print_graph(gm.graph)}"
        assert canonicalize(gm) == {}, f"seed {seed}: a second run changes something"
    assert refused * 10 <= len(seeds)


def test_random_programs():
    check_block(range(40))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(1, 9))
def test_more_random_programs(block):
    check_block(range(40 * block, 40 * block + 40))
