"""What all blocks share, computed inside of the first, moves in front of it; nothing else moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from tilewright.compiler.first_instance import gather_first_instances
from tilewright.compiler.repeats import cut

COUNT = 5
Shared = Callable[[Tensor, Tensor, Tensor], Tensor]


def _nowhere(node: fx.Node) -> bool:
    return False


def _half(x: Tensor) -> Tensor:
    for _ in range(4):
        x = torch.sin(x * 2.0) + torch.cos(x)
    return x


def _of_scale(x: Tensor, scale: Tensor, state: Tensor) -> Tensor:
    return torch.exp(scale).cos() + 1.0


def _of_block(x: Tensor, scale: Tensor, state: Tensor) -> Tensor:
    return torch.exp(x[:, :1]).cos() + 1.0


def _of_state(x: Tensor, scale: Tensor, state: Tensor) -> Tensor:
    return torch.exp(state.view(-1)[:1]).cos() + 1.0


def _stack(shared: Shared) -> Callable[..., tuple[Tensor, ...]]:
    """Blocks with state of their own that read what the first has computed in its middle."""

    def run(x: Tensor, scale: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        table, seen = None, []
        for w, state in zip(rest[:COUNT], rest[COUNT:], strict=True):
            new = state * 0.5 + x
            state.copy_(new)
            x = _half(new)
            if table is None:
                table = shared(x, scale, state)
            x = _half(x * table) @ w
            seen.append(new.sum())
        return (x, *seen)

    return run


def _given() -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    sizes = [(3, 4), (1,), *[(4, 4)] * COUNT, *[(3, 4)] * COUNT]
    return [torch.randn(*size, generator=g) for size in sizes]


def _captured(shared: Shared) -> fx.GraphModule:
    module = make_fx(_stack(shared), tracing_mode="fake")(*_given())
    for write in [n for n in module.graph.nodes if n.target is torch.ops.aten.copy_.default]:
        write.replace_all_uses_with(write.args[0])  # type: ignore[arg-type]  # the state is read itself
    return module


def _instances(graph: fx.Graph) -> int:
    owners = [p.instance_of for p in cut(graph)]
    return max((owners.count(o) for o in owners), default=0)


@pytest.mark.parametrize(
    ("shared", "gained"), [(_of_scale, 1), (_of_block, 0), (_of_state, 0)], ids=["scale", "block", "state"]
)
def test_only_what_is_shared_moves(shared: Shared, gained: int) -> None:
    module = _captured(shared)
    before = _instances(module.graph)
    order = [n.name for n in module.graph.nodes]
    assert gather_first_instances(module.graph, _nowhere) == gained
    module.graph.lint()
    module.recompile()
    assert (order == [n.name for n in module.graph.nodes]) == (gained == 0)
    assert _instances(module.graph) == before + gained
    ours, plain = _given(), _given()
    for got, want in zip(module(*ours), _stack(shared)(*plain), strict=True):
        assert torch.equal(got, want)
    assert all(map(torch.equal, ours, plain)), "states end as they did"
    assert not torch.equal(ours[-1], _given()[-1])


def test_calls_that_stand_alone_do_not_move() -> None:
    module = _captured(_of_scale)
    assert gather_first_instances(module.graph, lambda n: n.target is torch.ops.aten.exp.default) == 0


def test_a_first_block_with_another_constant_is_left() -> None:
    module = _captured(_of_scale)
    first = next(n for n in module.graph.nodes if n.target is torch.ops.aten.mul.Tensor and n.args[1] == 0.5)
    first.args = (first.args[0], 0.25)
    assert gather_first_instances(module.graph, _nowhere) == 0
