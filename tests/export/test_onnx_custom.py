"""Our kernels as operators of onnxruntime: same results, one library, refusals that say why."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tilewright as tw
from tilewright.compiler import ops
from tilewright.compiler.block_layout import BlockLayout
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.export.onnx_file import session
from tilewright.kernels.linear import family as linear_family
from tilewright.kernels.table import host_target

pytestmark = pytest.mark.skipif(host_target().arch == "generic", reason="no kernels for this CPU")


class Normal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(40)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_a_kernel_runs_in_onnxruntime(tmp_path: Path) -> None:
    call = {"x": torch.randn(2, 90, 40)}
    axes = {"x": {1: "rows"}}
    manifest = tw.export(
        Normal(), (), "exact", tmp_path / "out", kwargs=call, dynamic=axes, operators="custom"
    )
    (entry,) = manifest["entries"]
    (name,) = entry["operators"]
    assert re.fullmatch(r"tilewright::rms_norm_[0-9a-f]{10}", name)
    assert 0 < entry["parity"]["other sizes"]["model"] < 1e-6
    assert entry["library"] in manifest["files"]
    library = tmp_path / "out" / entry["library"]
    opened = session(tmp_path / "out" / "call.onnx", library=library, threads=2)
    long = torch.randn(2, 7000, 40)
    (got,) = opened.run(None, {"x": long.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), Normal()(long))
    command = ["nm", "-D", "--defined-only", str(library)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in shown.splitlines() if " T " in line]
    assert names == ["RegisterCustomOps"], "nothing may meet torch's functions of the same name"


class Sparse(nn.Module):
    def __init__(self, layout: BlockLayout) -> None:
        super().__init__()
        self.rest = list(layout.arguments())
        for i, value in enumerate(self.rest):
            if isinstance(value, Tensor):
                self.register_buffer(f"layout{i}", value)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rest = [getattr(self, f"layout{i}") if isinstance(x, Tensor) else x for i, x in enumerate(self.rest)]
        return ops.block_sparse_attention(q, k, v, *rest, 0.3)


@pytest.mark.slow
def test_sparse_attention_with_both_results(tmp_path: Path) -> None:
    layout = BlockLayout.causal(60, 60, 4, window=20, sink=5, q_block=16, k_block=16)
    torch.manual_seed(0)
    call = tuple(torch.randn(2, heads, 60, 16) for heads in (4, 2, 2))
    axes = {"k": {1: "heads"}, "v": {1: "heads"}}
    manifest = tw.export(Sparse(layout), call, "exact", tmp_path / "out", dynamic=axes, operators="custom")
    (entry,) = manifest["entries"]
    assert 0 < entry["parity"]["example"]["model"] < 1e-5
    opened = session(tmp_path / "out" / "call.onnx", library=tmp_path / "out" / entry["library"])
    feed = {name: tensor.numpy() for name, tensor in zip("qkv", call, strict=True)}
    first, again = opened.run(None, feed), opened.run(None, feed)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    three = {name: feed[name].repeat(2, 1)[:, :3] for name in "kv"}
    with pytest.raises(Exception, match="H must be a multiple of Hkv"):
        opened.run(None, {**feed, **three})


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["cpu-int8", "cpu-int4"])
def test_a_quantized_decoder(tmp_path: Path, pipeline: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tilewright.frontends.example_calls import causal_lm_examples
    from tilewright.frontends.loaded_model import LoadedModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=97, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval()
    model = LoadedModel("small", "causal-lm", module, None, causal_lm_examples(module))
    manifest = tw.export(model, pipeline=pipeline, path=tmp_path / "out", operators="custom")
    for entry in manifest["entries"]:
        assert not any("MatMul" in name for name in entry["operators"])
        for call in ("example", "other sizes"):
            # Norms round otherwise than their definition: a few activations fall on another 8-bit step.
            found = entry["parity"][call]
            assert 0 < found["program"] < 1e-2
            assert found["rounding"] > 0


def test_requests_that_make_no_sense(tmp_path: Path) -> None:
    call = (torch.randn(3, 7),)
    with pytest.raises(OptionError, match="operators"):
        tw.export(nn.Linear(7, 5), call, "exact", tmp_path / "out", operators="costum")
    with pytest.raises(OptionError, match="format onnx"):
        tw.export(nn.Linear(7, 5), call, "exact", tmp_path / "out", "pt2", operators="custom")


def test_what_has_no_kernel_stays_standard(tmp_path: Path) -> None:
    layer = nn.Linear(7, 5).double()
    manifest = tw.export(layer, (torch.randn(3, 7).double(),), "exact", tmp_path / "out", operators="custom")
    (entry,) = manifest["entries"]
    assert entry["library"] is None
    assert "float64" in entry["standard"]["linear"]
    assert not any(name.startswith("tilewright") for name in entry["operators"])


def test_a_kernel_that_computes_with_torch_stays_standard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host_target().arch != "avx512":
        pytest.skip("the kernel of many rows is made for AVX-512")
    monkeypatch.setattr(linear_family, "library_is_narrow", lambda: True)
    manifest = tw.export(
        nn.Linear(7, 5), (torch.randn(72, 7),), "exact", tmp_path / "out", operators="custom"
    )
    (entry,) = manifest["entries"]
    assert entry["library"] is None
    assert "with torch" in entry["standard"]["linear"]
