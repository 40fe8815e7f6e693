"""All pieces of a program are written before the first wait for their kernels; errors surface at the end."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.async_compile import AsyncCompile

import tilewright.frontends.compile as compile_module
from tilewright.frontends.compile import REPORTS
from tilewright.frontends.late_wait import waiting_at_the_end


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(7):
            x = torch.sin(x * 0.5) + torch.cos(x) * 0.25
        return x @ self.weight


def _stack() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    blocks = [Block(23) for _ in range(5)]
    return nn.Sequential(nn.Softplus(), *blocks, nn.Softsign()).eval(), torch.randn(3, 23)


@torch.no_grad()
def test_the_pieces_are_written_before_any_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    wait, compile_one = AsyncCompile._wait_futures, compile_module.compile_graph

    def waited(self: AsyncCompile, scope: dict[str, Any]) -> None:
        happened.append("wait")
        wait(self, scope)

    def written(*args: Any, **kwargs: Any) -> Any:
        result = compile_one(*args, **kwargs)
        happened.append("written")
        return result

    monkeypatch.setattr(compile_module, "compile_graph", written)
    monkeypatch.setattr(AsyncCompile, "_wait_futures", waited)
    honest = AsyncCompile.wait
    module, x = _stack()
    with torch._inductor.config.patch(compile_threads=2, force_disable_caches=True):
        compiled = torch.compile(module, backend="tilewright")
        torch.testing.assert_close(compiled(x), module(x))
    assert len(REPORTS[-1].pieces) >= 2
    assert happened == sorted(happened, reverse=True), "written, written, ..., wait, wait"
    assert happened.count("wait") == happened.count("written") == len(REPORTS[-1].pieces)
    assert AsyncCompile.wait is honest


def test_another_thread_waits_as_ever() -> None:
    seen: list[Any] = []

    def elsewhere() -> None:
        scope: dict[str, Any] = {}
        with torch._inductor.config.patch(compile_threads=2):
            scope["kernel"] = AsyncCompile.submit(lambda: 7)
            AsyncCompile().wait(scope)
        seen.append(scope["kernel"])

    with waiting_at_the_end():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(60)
        assert seen == [7]


def test_what_the_compiler_refuses_is_raised_at_the_end() -> None:
    def refuse() -> None:
        raise RuntimeError("refused")

    honest = AsyncCompile.wait
    with torch._inductor.config.patch(compile_threads=2):
        scope = {"kernel": AsyncCompile.submit(refuse)}
        with pytest.raises(RuntimeError, match="refused"), waiting_at_the_end():
            AsyncCompile().wait(scope)
        with pytest.raises(ZeroDivisionError), waiting_at_the_end():
            raise ZeroDivisionError
    assert AsyncCompile.wait is honest
