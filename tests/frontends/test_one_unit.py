"""C++ kernels of one graph share translation units and give the bits they gave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache

from tilewright.frontends import one_unit
from tilewright.frontends.compile import REPORTS
from tilewright.frontends.late_wait import waiting_at_the_end

PREFIX = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
POINTERS = ["const float*", "float*"]


def _kernel(index: int, body: str, types: str = "const float* in, float* out") -> str:
    same_name = f"static inline float helper(float x) {{ return x + {index}; }}\n"
    return PREFIX + same_name + f'extern "C"  void  kernel({types})\n{{\n    {body}\n}}\n'


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is handed to the compiler."""
    texts: list[str] = []
    honest = CppPythonBindingsCodeCache.load_async.__func__  # type: ignore[attr-defined]

    def load_async(cls: Any, text: str, *args: Any, **kwargs: Any) -> Any:
        texts.append(text)
        return honest(cls, text, *args, **kwargs)

    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_async", classmethod(load_async))
    return texts


def _compile(kernels: list[one_unit.Kernel]) -> list[Any]:
    honest = AsyncCompile.cpp_pybinding
    with torch._inductor.config.patch(compile_threads=2):
        compiling, scope = AsyncCompile(), dict[str, Any]()
        with waiting_at_the_end():
            for i, (types, source) in enumerate(kernels):
                scope[f"kernel_{i}"] = compiling.cpp_pybinding(list(types), source)
            compiling.wait(scope)
    assert AsyncCompile.cpp_pybinding is honest
    return [scope[f"kernel_{i}"] for i in range(len(kernels))]


def test_each_function_is_its_own_kernel(units: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_unit, "LIMIT", 3)
    kernels: list[one_unit.Kernel] = [(POINTERS, _kernel(i, "out[0] = helper(in[0]);")) for i in range(4)]
    scaled = _kernel(9, "out[0] = helper(in[0]) * n;", "const float* in, float* out, const int64_t n")
    kernels.insert(1, ([*POINTERS, "const int64_t"], scaled))
    functions = _compile(kernels)
    assert [text.count("#define kernel ") for text in units] == [2, 3]
    assert [text.count("cpp_prefix.h") for text in units] == [1, 1]
    x, out, seen = torch.tensor([0.5]), torch.empty(1), []
    for function, (types, _) in zip(functions, kernels, strict=True):
        function(x, out, *[3] * (len(types) - 2))
        seen.append(out.item())
    assert seen == [0.5, 9.5 * 3, 1.5, 2.5, 3.5]
    with pytest.raises(RuntimeError, match="requires 3 args"):
        functions[1](x, out)


def test_what_a_namespace_does_not_hold_is_compiled_alone(units: list[str]) -> None:
    sources = [_kernel(i, "out[0] = helper(in[0]);") for i in range(4)]
    sources[1] = "#define ONE 1\n" + sources[1]
    sources[2] += 'extern "C" int kernel_extra() { return 0; }\n'
    assert [one_unit.may_share(source) for source in sources] == [True, False, False, True]
    out = torch.empty(1)
    for i, function in enumerate(_compile([(POINTERS, source) for source in sources])):
        function(torch.tensor([0.5]), out)
        assert out.item() == i + 0.5
    assert sorted(text.count("#define kernel ") for text in units) == [0, 0, 2]


def test_what_the_compiler_refuses_is_told() -> None:
    with pytest.raises(Exception, match="undeclared_name"):
        _compile([(POINTERS, _kernel(i, "out[0] = undeclared_name;")) for i in range(2)])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(width, width) / width for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            y = torch.sin(x) * 0.5 + torch.cos(x * 1.25)
            x = x + torch.softmax(y @ weight, -1) + torch.tanh(y)
        return x


@torch.no_grad()
def test_the_bits_are_those_of_kernels_alone(units: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(*(Block(37) for _ in range(4))).eval(), torch.randn(5, 37)
    results, shared = [], []
    for limit in (1, 8):
        monkeypatch.setattr(one_unit, "LIMIT", limit)
        torch._dynamo.reset()
        units.clear()
        with torch._inductor.config.patch(compile_threads=2, force_disable_caches=True):
            results.append(torch.compile(module, backend="tilewright")(x))
        assert len(REPORTS[-1].pieces) == 1
        shared.append([text.count("#define kernel ") for text in units])
    torch.testing.assert_close(results[0], module(x))
    assert torch.equal(*results)
    alone, together = shared
    assert not any(alone)
    assert len(alone) >= 2
    assert together == [len(alone)]
