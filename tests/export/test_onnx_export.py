"""ONNX export: runs in onnxruntime, equals the program, names what it cannot write."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

import tilewright as tw
from tilewright.compiler.diagnostics import ExportError, OptionError, ParityError
from tilewright.compiler.parity import relative_rms
from tilewright.frontends import weight_offload
from tilewright.frontends.calibration import calibrate
from tilewright.frontends.cli import main
from tilewright.frontends.export import parity
from tilewright.frontends.export.artifact import faults
from tilewright.frontends.export.onnx_file import session
from tilewright.frontends.loaders import resolve
from tilewright.frontends.weight_offload import offload_weights


def decoder(layers: int = 1) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=97, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def loaded(module: nn.Module):
    from tilewright.frontends.example_calls import causal_lm_examples
    from tilewright.frontends.loaded_model import LoadedModel

    return LoadedModel("small", "causal-lm", module, None, causal_lm_examples(module))


def check_pair(manifest: dict, limit: float) -> None:
    assert [e["name"] for e in manifest["entries"]] == ["prefill", "decode"]
    for entry in manifest["entries"]:
        for call in ("example", "other sizes"):
            assert 0 < entry["parity"][call]["program"] < limit


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, dict]:
    module, path = decoder(), tmp_path_factory.mktemp("exact") / "out"
    return module, path, tw.export(loaded(module), path=path)


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "limit"), [("cpu-int8", 1e-5), ("cpu-int4", 5e-2)])
def test_presets_keep_their_meaning(tmp_path: Path, pipeline: str, limit: float) -> None:
    check_pair(tw.export(loaded(decoder()), pipeline=pipeline, path=tmp_path / "out"), limit)


def test_generation_equals_the_model(exact: tuple[nn.Module, Path, dict]) -> None:
    module, folder, manifest = exact
    check_pair(manifest, 1e-5)
    assert faults(folder) == []
    tokens = torch.randint(3, 97, (1, 9))
    prefill, decode = (session(folder / f"{name}.onnx") for name in ("prefill", "decode"))
    positions = np.arange(9)[None]
    given = {"input_ids": tokens[:, :5].numpy(), "position_ids": positions[:, :5]}
    logits, *cache = prefill.run(None, given)
    for at in range(5, 9):
        given = {"input_ids": tokens[:, at : at + 1].numpy(), "position_ids": positions[:, at : at + 1]}
        given |= {"past.0.key": cache[0], "past.0.value": cache[1]}
        logits, *cache = decode.run(None, given)
    with torch.no_grad():
        want = module(tokens).logits[:, -1:]
    assert relative_rms(torch.from_numpy(logits), want) < 1e-5


def test_weights_are_held_once_and_outside_the_model(exact: tuple[nn.Module, Path, dict]) -> None:
    module, folder, _ = exact
    weights = sum(p.numel() * 4 for p in module.parameters())
    size = (folder / "weights.data").stat().st_size
    assert weights <= size < weights + 40 * 4096
    for name in ("prefill", "decode"):
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        onnx.checker.check_model(str(folder / f"{name}.onnx"))
        places = {e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"}
        assert places == {"weights.data"}


def test_quantized_weights_use_the_block_operator(tmp_path: Path) -> None:
    pipeline = "quantize-linear{weight=int4,group=32,activation=int8-group,head=true},fuse-projections"
    manifest = tw.export(loaded(decoder()), pipeline=pipeline, path=tmp_path / "out")
    counts = manifest["entries"][1]["operators"]
    assert counts["com.microsoft::MatMulNBits"] == 5  # q k v as one, o, gate and up as one, down, head
    assert "MatMul" not in counts
    assert manifest["entries"][1]["exactness"] == "approximate"


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("rounding", ["rtn", "whole-zero"])
def test_offsets_of_grids(tmp_path: Path, rounding: str, axes: int) -> None:
    """Whole ones are zero points; others one product with the sums of groups, which three axes pool."""
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(96, 40), nn.ReLU()).eval()
    with torch.no_grad():
        module[0].weight += 0.05
    options = f"weight=int4,group=32,mode=float-zero,rounding={rounding}"
    x = torch.randn(2, 5, 96)[(0,) * (3 - axes)]
    manifest = tw.export(module, (x,), f"quantize-linear{{{options}}}", tmp_path / "out", "onnx")
    (entry,) = manifest["entries"]
    sums = {"AveragePool": 1} if axes == 3 else {"Reshape": 1, "ReduceSum": 1}
    rest = {} if rounding == "whole-zero" else {"MatMul": 1, "Add": 2, **sums}
    assert entry["operators"] == {"com.microsoft::MatMulNBits": 1, "Add": 1, "Relu": 1} | rest
    assert entry["parity"]["example"]["program"] < 1e-5


@pytest.mark.parametrize("group", [0, 32])
def test_static_activations_keep_their_step(tmp_path: Path, group: int) -> None:
    """On the calibrated grid, cut at its ends: what the call has seen four times larger."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU()).eval()
    x = torch.randn(5, 64)
    calibrate(module, [((x,), {})]).save(tmp_path / "s.safetensors")
    scheme = f"quantize-linear{{group={group},activation=int8-static,calibration={tmp_path}/s.safetensors}}"
    tw.export(module, (x,), scheme, tmp_path / "out", "onnx")
    torch._dynamo.reset()
    options = {"pipeline": scheme, "lower": "eager"}
    compiled = torch.compile(module, backend="tilewright", options=options)
    with torch.no_grad():
        want, plain = compiled(4 * x), module(4 * x)
    (name,) = [i.name for i in session(tmp_path / "out" / "call.onnx").get_inputs()]
    (got,) = session(tmp_path / "out" / "call.onnx").run(None, {name: (4 * x).numpy()})
    assert (torch.from_numpy(got) - want).norm() < 1e-3 * want.norm()
    assert (want - plain).norm() > 0.1 * plain.norm(), "nothing was cut"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("activation", "group"), [("int8-token", 0), ("int4-token", 0), ("int4-token", 32)])
def test_a_step_per_token(tmp_path: Path, activation: str, group: int, bias: bool) -> None:
    """Tokens of any size, and of none: each has its step, and the bias has none."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(96, 40, bias=bias), nn.ReLU()).eval()
    x = torch.randn(2, 6, 96) * torch.tensor([1e-6, 0.1, 1.0, 7.0, 1e12, 0.0])[:, None]
    scheme = f"quantize-linear{{weight=int4,group={group},activation={activation}}}"
    manifest = tw.export(module, (x,), scheme, tmp_path / "out", "onnx")
    (entry,) = manifest["entries"]
    assert entry["operators"]["MatMulInteger" if group == 0 else "com.microsoft::MatMulNBits"] == 1
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="tilewright", options={"pipeline": scheme, "lower": "eager"})
    with torch.no_grad():
        want, plain = compiled(x), module(x)
    (name,) = [i.name for i in session(tmp_path / "out" / "call.onnx").get_inputs()]
    (got,) = session(tmp_path / "out" / "call.onnx").run(None, {name: x.numpy()})
    errors = (torch.from_numpy(got) - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)
    assert errors.max() < 1e-5, "token by token"
    coarse = ((want - plain).norm(dim=-1) / plain.norm(dim=-1))[:, 2:5].min()
    assert coarse > (0.05 if activation == "int4-token" else 0.02)


def test_small_floats_are_refused_by_name(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(32, 16), nn.ReLU()).eval()
    with pytest.raises(ExportError, match="a weight of nvfp4"):
        tw.export(module, (torch.randn(3, 32),), "quantize-linear{weight=nvfp4}", tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=70, vocab_size=53
    )
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, 7:] = 0
    return BertModel(config).eval(), {"input_ids": torch.randint(0, 53, (2, 11)), "attention_mask": mask}


def test_an_encoder_with_dynamic_batch_and_length(tmp_path: Path) -> None:
    module, call = encoder()
    axes = {name: {0: "batch", 1: "sequence"} for name in call}
    manifest = tw.export(module, (), "exact", tmp_path / "out", kwargs=call, dynamic=axes)
    (entry,) = manifest["entries"]
    assert entry["inputs"][0] == {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}
    assert entry["outputs"][0]["name"] == "last_hidden_state"
    tokens, mask = torch.randint(0, 53, (3, 6)), torch.ones(3, 6, dtype=torch.int64)
    mask[2, 4:] = 0
    feed = {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()}
    got = session(tmp_path / "out" / "call.onnx").run(None, feed)
    with torch.no_grad():
        want = module(tokens, attention_mask=mask)
    assert relative_rms(torch.from_numpy(got[0]), want.last_hidden_state) < 1e-5
    assert relative_rms(torch.from_numpy(got[1]), want.pooler_output) < 1e-5


def test_a_video_transformer(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    module = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=24, freq_dim=32, ffn_dim=40, num_layers=1, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    call = {
        "hidden_states": torch.randn(1, 4, 2, 8, 6), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 24), "return_dict": False,
    }  # fmt: skip
    manifest = tw.export(module, (), "exact", tmp_path / "out", kwargs=call)
    (entry,) = manifest["entries"]
    assert [row["name"] for row in entry["inputs"]] == ["hidden_states", "timestep", "encoder_hidden_states"]
    assert 0 < entry["parity"]["example"]["model"] < 1e-5


class Many(nn.Module):
    """One use of each of many operators."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(20.0).reshape(4, 5))

    def forward(self, x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        first, second = x.split([2, 3], -1)
        a, b = x.unbind(0)[:2]
        parts = torch.stack([a, b], 1).squeeze(0).flatten(0, 1)
        kept = torch.where(x > 0.1, x, x.new_full((), -1.0)).masked_fill(x < -0.5, 2.0)
        shaped = torch.cat([first.mean(-1, keepdim=True), second.sum(-1, keepdim=True)], -1).clamp(-1, 1)
        picked = self.table[i] + self.table[i, i].unsqueeze(-1) + x.index_select(2, i).amax(-1).sum()
        odd = x[..., 1::2].pow(3).transpose(0, 1).repeat(1, 2, 1) // 0.3
        signs = (x.abs().sqrt() * x.sigmoid() - x.neg().exp().log1p()).round()
        triangle = torch.ones(3, 3, dtype=torch.bool).tril(-1)
        steps = x.diff(n=2, dim=1, prepend=x[:, :1]), (x > 0).diff(append=x[..., :2] > 0)
        rest = torch.cumsum(i, 0) % 3, x.softmax(1).rsqrt()
        return parts, kept, shaped, picked, odd, signs, triangle, *steps, *rest


def test_many_operators(tmp_path: Path) -> None:
    torch.manual_seed(0)
    args = (torch.randn(2, 3, 5), torch.tensor([3, 0, 2]))
    manifest = tw.export(Many(), args, "exact", tmp_path / "out")
    assert manifest["entries"][0]["parity"]["example"]["model"] < 1e-5


@pytest.mark.slow
def test_a_prefill_with_the_length_named_by_the_user(tmp_path: Path) -> None:
    axes = {"input_ids": {1: "sequence"}}
    manifest = tw.export(loaded(decoder()), path=tmp_path / "out", kind="prefill", dynamic=axes)
    (entry,) = manifest["entries"]
    assert entry["inputs"] == [{"name": "input_ids", "dtype": "int64", "shape": [1, "sequence"]}]
    assert entry["parity"]["other sizes"]["model"] < 1e-5


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values, _ = torch.sort(x)
        return values + torch.linalg.det(x)


def test_operators_without_counterpart_are_listed_together(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"2 calls.*sort.*test_onnx_export.py:\d+.*linalg_det"):
        tw.export(Odd(), (torch.randn(3, 3),), "exact", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_model_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "ROUNDING_LIMIT", 1e-12)
    with pytest.raises(ParityError, match="export differs"):
        tw.export(nn.Linear(7, 5), (torch.randn(3, 7),), "exact", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_bad_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = (torch.randn(3, 7),)
    with pytest.raises(OptionError, match="format"):
        tw.export(nn.Linear(7, 5), call, "exact", tmp_path / "out", "onix")
    with pytest.raises(OptionError, match="did you mean 'input'"):
        tw.export(nn.Linear(7, 5), call, "exact", tmp_path / "out", dynamic={"inputs": {0: "batch"}})
    with pytest.raises(OptionError, match="axis 2"):
        tw.export(nn.Linear(7, 5), call, "exact", tmp_path / "out", dynamic={"input": {2: "batch"}})
    with pytest.raises(ExportError, match="static shape of 7"):
        tw.export(nn.Linear(7, 5), call, "exact", tmp_path / "out", dynamic={"input": {1: "batch"}})
    assert main(["export", "tiny-llama", "-o", str(tmp_path)]) == 2
    assert main(["export", "tiny-llama", "-o", str(tmp_path / "x"), "--dynamic", "input_ids"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert list(tmp_path.iterdir()) == []


def test_the_command_lets_weights_leave_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = list[nn.Module]()

    def record(model: nn.Module, folder: Path) -> int:
        moved.append(model)
        return offload_weights(model, folder)

    monkeypatch.setattr(weight_offload, "offload_weights", record)
    own = resolve("tiny-llama").module
    with torch.no_grad():
        own.lm_head.weight.mul_(1.5)
    save_model(own, str(tmp_path / "own.safetensors"))
    call = ["export", "tiny-llama", "--call", "decode", "--static", "-o", str(tmp_path / "out")]
    assert main([*call, "--weights", str(tmp_path / "own.safetensors")]) == 0
    assert len(moved) == 1
    assert torch.equal(moved[0].lm_head.weight, own.lm_head.weight)
    with pytest.raises(OptionError, match=r"weights = 'own\.safetensors' belongs to a MODEL text"):
        tw.export(nn.Linear(7, 5), (torch.randn(3, 7),), "exact", tmp_path / "x", weights="own.safetensors")
