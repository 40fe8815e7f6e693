"""Folders in the layouts of compressed-tensors and torchao: read, kept quantized, run; bad ones refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.frontends.quantized_folders import LINEARS, Made, compressed, pack_words, torchao
from tilewright.compiler.diagnostics import LoadError
from tilewright.compiler.quantizers import fake_activation
from tilewright.compiler.weight_format import WeightFormat
from tilewright.frontends.gguf_blocks import QuantizedLinear
from tilewright.frontends.hugging_face import load_folder

TOKENS = torch.arange(3, 20)[None]
LAYOUTS: dict[str, Callable[[], Made]] = {
    "int4 groups": compressed,
    "int4 groups of float16 scales": lambda: compressed(dtype=torch.float16),
    "int4 groups, zero points": lambda: compressed(symmetric=False),
    "int4 rows": lambda: compressed(group=0),
    "int4 rows, zero points": lambda: compressed(group=0, symmetric=False),
    "int8 packed": lambda: compressed(bits=8),
    "int8 rows": lambda: compressed(bits=8, group=0, form="int-quantized"),
    "int8 rows, zero points": lambda: compressed(bits=8, group=0, form="int-quantized", symmetric=False),
}
"""16-bit scales: scale * code + offset is exact in float32."""
FLOAT32_SCALES: dict[str, Callable[[], Made]] = {
    "int8 naive": lambda: compressed(bits=8, group=0, form="naive-quantized", dtype=torch.float32),
    "int4 groups": lambda: compressed(symmetric=False, dtype=torch.float32),
    "torchao Int8Tensor": lambda: torchao("Int8Tensor"),
    "torchao IntxUnpackedToInt8Tensor": lambda: torchao("IntxUnpackedToInt8Tensor"),
    "torchao Int4Tensor": lambda: torchao("Int4Tensor"),
}


SLOW = ("int4 groups", "int4 rows, zero points", "int8 packed", "int8 rows", "int8 rows, zero points")


def held(module: torch.nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the quantized layers mean, float32."""
    return {
        f"{name}.weight": WeightFormat.parse(layer.format).dequantize(
            layer.packed, layer.out_features, layer.in_features
        )
        for name, layer in held(module).items()
    }


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_weights_are_those_of_the_file(layout: str, tmp_path: Path) -> None:
    made = LAYOUTS[layout]()
    module = load_folder(made.write(tmp_path / "model")).module
    found = weights_of(module)
    assert len(found) == LINEARS
    for name, weight in found.items():
        assert torch.equal(weight, made.meant[name]), name
    with torch.no_grad():
        got = module(TOKENS, use_cache=False).logits
        assert torch.equal(got, made.reference()(TOKENS, use_cache=False).logits)
    names = dict(module.named_parameters())
    assert not any(name.endswith("_proj.weight") for name in names)


@pytest.mark.parametrize("layout", list(FLOAT32_SCALES))
def test_float32_scales_are_kept_and_products_rounded_once(layout: str, tmp_path: Path) -> None:
    made = FLOAT32_SCALES[layout]()
    module = load_folder(made.write(tmp_path / "model")).module
    assert len(found := weights_of(module)) == LINEARS
    for name, weight in found.items():  # the offset, at most 128 * 0.025, is where float32 rounds
        torch.testing.assert_close(weight, made.meant[name], rtol=0, atol=128 * 0.025 * 2**-23)
    with torch.no_grad():
        got = module(TOKENS, use_cache=False).logits
        want = made.reference()(TOKENS, use_cache=False).logits
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_packing_of_a_row_known_by_hand() -> None:
    codes = torch.tensor([[-8, 7, 0, 1, -1, 3, -4, 5]])
    assert pack_words(codes, 4).view(torch.int32).item() & 0xFFFFFFFF == 0xD4B798F0


@pytest.mark.parametrize(
    "layout",
    ["int4 groups, zero points", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_kernels_read_the_quantized_weights(layout: str, tmp_path: Path) -> None:
    made = LAYOUTS[layout]()
    module = load_folder(made.write(tmp_path / "model")).module
    bits = made.config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"]
    wide = sum(made.meant[f"{name}.weight"].numel() * 4 for name in held(module))
    kept = sum(layer.packed.numel() for layer in held(module).values())
    assert kept < wide * (bits / 32 + 0.07)  # 8 bytes of grid for 32 columns of 4 bits are the most
    options = {"pipeline": "exact", "require": {"quantized_linear": LINEARS}, "lower": "eager"}
    with torch.no_grad():
        want = made.reference()(TOKENS, use_cache=False).logits
        got = torch.compile(module, backend="tilewright", options=options)(TOKENS, use_cache=False).logits
    assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("make", [
    lambda: compressed(bits=8, group=0, form="int-quantized", activations=True),
    lambda: torchao("Int8Tensor", activations=True),
])  # fmt: skip
def test_dynamic_activations_are_quantized_per_token(make: Callable[[], Made], tmp_path: Path) -> None:
    made = make()
    layer = load_folder(made.write(tmp_path / "model")).module.model.layers[0].mlp.down_proj
    torch.manual_seed(0)
    x = torch.randn(5, layer.in_features)
    want = fake_activation(x, "int8-token", 0) @ made.meant["model.layers.0.mlp.down_proj.weight"].t()
    assert layer.format.split(".")[3] == "int8-token"
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def test_scales_that_float16_holds_stay_float16(tmp_path: Path) -> None:
    module = load_folder(compressed(dtype=torch.float16).write(tmp_path / "a")).module
    assert {layer.format for layer in held(module).values()} == {"int4.32.symmetric.none.blocks8"}
    module = load_folder(compressed(dtype=torch.float32).write(tmp_path / "b")).module
    assert {layer.format for layer in held(module).values()} == {"int4.32.symmetric.none.blocks8.wide"}


def test_zero_points_in_the_middle_cost_nothing(tmp_path: Path) -> None:
    made = torchao("IntxUnpackedToInt8Tensor")
    for name, tensor in made.tensors.items():
        if name.endswith("zero_point"):
            tensor.zero_()
    module = load_folder(made.write(tmp_path / "model")).module
    assert {layer.format for layer in held(module).values()} == {"int4.32.symmetric.none.blocks8.wide"}


def test_biases_and_shards_are_read(tmp_path: Path) -> None:
    made = compressed()
    made.config["attention_bias"] = True
    for part, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
        name = f"model.layers.0.self_attn.{part}_proj.bias"
        made.tensors[name] = made.meant[name] = torch.randn(rows)
    folder = made.write(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {"one.safetensors": {}, "two.safetensors": {}}
    for name, tensor in made.tensors.items():  # a layer's scales lie in another file than its codes
        shards["two.safetensors" if name.endswith("_scale") else "one.safetensors"][name] = (
            tensor.contiguous()
        )
    for file, tensors in shards.items():
        save_file(tensors, folder / file, {"format": "pt"})
    index = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    module = load_folder(folder).module
    assert len(held(module)) == LINEARS
    with torch.no_grad():
        want = made.reference()(TOKENS, use_cache=False).logits
        assert torch.equal(module(TOKENS, use_cache=False).logits, want)


def test_targets_and_ignore_choose_the_layers(tmp_path: Path) -> None:
    made = compressed()
    settings = made.config["quantization_config"]
    settings["config_groups"]["group_0"]["targets"] = [
        r"re:.*self_attn\..*",
        r"re:.*mlp\.(gate|up|down)_proj$",
    ]
    settings["ignore"] = ["lm_head", r"re:.*\.0\.mlp\.up_proj"]
    stem = "model.layers.0.mlp.up_proj"
    for part in ("packed", "scale", "shape"):
        del made.tensors[f"{stem}.weight_{part}"]
    made.tensors[f"{stem}.weight"] = made.meant[f"{stem}.weight"]
    module = load_folder(made.write(tmp_path / "model")).module
    assert len(held(module)) == LINEARS - 1
    assert stem not in held(module)
    with torch.no_grad():
        want = made.reference()(TOKENS, use_cache=False).logits
        assert torch.equal(module(TOKENS, use_cache=False).logits, want)


UP = "model.layers.0.mlp.up_proj"


def _group(made: Made, **changes: object) -> None:
    made.config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)


def _entry(made: Made, **changes: object) -> None:
    made.config["quantization_config"].update(changes)


def _tensor(name: str, value: torch.Tensor) -> Callable[[Made], None]:
    return lambda made: made.tensors.update({f"{UP}.{name}": value})


BAD: dict[str, tuple[Callable[[Made], object], str]] = {
    "method": (lambda m: _entry(m, quant_method="gptq"), r"quant_method 'gptq' \(compressed-tensors and"),
    "format": (lambda m: _entry(m, format="marlin-24"), "format is 'marlin-24'"),
    "float": (lambda m: _group(m, type="float", num_bits=8), "weights.type is 'float'"),
    "bits": (lambda m: _group(m, num_bits=3), "num_bits is 3 .4 or 8"),
    "group": (lambda m: _group(m, group_size=48), "group_size is 48 .*64 columns"),
    "small group": (lambda m: _group(m, group_size=16), "group = 16: expected a multiple of 32"),
    "no group": (lambda m: _group(m, group_size=-1), "group_size is -1"),
    "strategy": (lambda m: _group(m, strategy="block"), "strategy is 'block'"),
    "other group": (lambda m: _group(m, group_size=64), r"weight_scale' has shape \[64, 2\]"),
    "no groups": (lambda m: _entry(m, config_groups={}), "no config_groups"),
    "no targets": (lambda m: _entry(m, ignore=["Linear"]), "leaves its layer as it is"),
    "ignored": (lambda m: _entry(m, ignore=["lm_head", UP]), "up_proj.weight_packed' is there"),
    "not ignored": (lambda m: _entry(m, ignore=[]), "lacks tensor 'lm_head.weight_packed'"),
    "slow pattern": (lambda m: _entry(m, ignore=["re:(a+)+$"]), "pattern .* is too involved"),
    "bad pattern": (lambda m: _entry(m, ignore=["re:(a"]), "pattern .* is illegal"),
    "cache": (lambda m: _entry(m, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is set"),
    "transform": (lambda m: _entry(m, transform_config={"config_groups": {"R1": 1}}), "transform_config is"),
    "lost": (lambda m: m.tensors.pop(f"{UP}.weight_scale"), "lacks tensor '.*up_proj.weight_scale'"),
    "shape": (_tensor("weight_shape", torch.tensor([96, 60])), r"weight_shape' is \[96, 60\]"),
    "words": (_tensor("weight_packed", torch.zeros(96, 7, dtype=torch.int32)), r"shape \[96, 7\].*\[96, 8\]"),
    "dtype": (_tensor("weight_packed", torch.zeros(96, 8)), "is F32, not I32"),
    "order": (_tensor("weight_g_idx", torch.zeros(64, dtype=torch.int32)), "weight_g_idx' puts the columns"),
    "nan": (_tensor("weight_scale", torch.full((96, 2), float("nan"))), "192 of 192 scales .* NaN"),
    "stray": (lambda m: m.tensors.update({"x.weight_packed": torch.zeros(1)}), "'x.weight_packed' belongs"),
    "zero": (_tensor("weight_zero_point", torch.ones(12, 2).int()), "weight_zero_point' is not zero"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_bad_folders_get_one_line(case: str, tmp_path: Path) -> None:
    made = compressed()
    change, message = BAD[case]
    change(made)
    with pytest.raises(LoadError, match=message) as caught:
        load_folder(made.write(tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_zero_points_of_another_shape_are_refused(tmp_path: Path) -> None:
    made = compressed(symmetric=False)
    made.tensors[f"{UP}.weight_zero_point"] = torch.zeros(96, 2, dtype=torch.int32)
    with pytest.raises(LoadError, match=r"weight_zero_point' has shape \[96, 2\]; the layer needs \[12, 2\]"):
        load_folder(made.write(tmp_path / "model"))


def test_int4_codes_out_of_range_are_refused(tmp_path: Path) -> None:
    made = compressed(form="int-quantized")
    made.tensors[f"{UP}.weight"][3, 5] = 8
    with pytest.raises(LoadError, match=r"up_proj.weight' holds 8 \(4 bits are -8 to 7\)"):
        load_folder(made.write(tmp_path / "model"))


def test_a_tied_head_cannot_be_quantized_apart(tmp_path: Path) -> None:
    made = compressed()
    made.config["tie_word_embeddings"] = True
    made.config["quantization_config"]["ignore"] = []
    made.tensors |= {
        "lm_head.weight_packed": torch.zeros(40, 8, dtype=torch.int32),
        "lm_head.weight_scale": torch.ones(40, 2),
        "lm_head.weight_shape": torch.tensor([40, 64]),
    }
    del made.tensors["lm_head.weight"]
    with pytest.raises(LoadError, match="'lm_head' is quantized, but shares its weight"):
        load_folder(made.write(tmp_path / "model"))


BAD_TORCHAO: dict[str, tuple[Callable[[Made], object], str]] = {
    "no metadata": (lambda m: m.metadata.pop("tensor_names"), "do not say which tensors are torchao's"),
    "kind": (lambda m: _meta(m, _type="Float8Tensor"), "_type is 'Float8Tensor' .read: Int4Tensor"),
    "block": (lambda m: _meta(m, _data={"block_size": [1, 48]}), r"block_size is \[1, 48\]"),
    "part": (lambda m: _meta(m, _tensor_data_names=["qdata", "act_pre_scale"]), "'act_pre_scale' is not"),
    "lost": (lambda m: m.tensors.pop(f"{UP}._weight_scale"), "lacks tensor '.*up_proj._weight_scale'"),
    "nan": (_tensor("_weight_scale", torch.full((2, 96), float("nan"))), "scales or offsets are NaN"),
    "turned": (_tensor("_weight_scale", torch.ones(96, 2)), r"shape \[96, 2\]; the layer needs \[2, 96\]"),
}  # fmt: skip


def _meta(made: Made, **changes: object) -> None:
    text = made.metadata[f"{UP}.weight"]
    made.metadata[f"{UP}.weight"] = json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize("case", list(BAD_TORCHAO))
def test_bad_torchao_folders_get_one_line(case: str, tmp_path: Path) -> None:
    made = torchao("Int4Tensor")
    change, message = BAD_TORCHAO[case]
    change(made)
    with pytest.raises(LoadError, match=message) as caught:
        load_folder(made.write(tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_pickled_torchao_weights_are_never_read(tmp_path: Path) -> None:
    folder = torchao("Int8Tensor").write(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        LoadError, match="'pytorch_model.bin', which is not read because such files can run code"
    ):
        load_folder(folder)
