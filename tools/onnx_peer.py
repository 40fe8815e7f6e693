"""onnxruntime's own fastest int4 form of a Llama, built by hand from its contributed operators.

One product for q, k and v, GroupQueryAttention over buffers that are input and output at once,
SkipSimplifiedLayerNormalization, MatMulNBits with 8-bit activations (accuracy_level 4) for every linear layer
and the head: what its model builder makes for CPUs. Weights are rounded to the nearest of 16 steps from the
largest of each 32, as `block_wise` symmetric quantization has it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from tilewright.frontends.export.onnx_file import session
from tilewright.frontends.export.onnx_graph import MICROSOFT

GROUP = 32


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(uint8 [N, K / 32, 16], two codes a byte, float32 [N K / 32]) of a weight [N, K]."""
    blocks = weight.detach().float().reshape(weight.shape[0], -1, GROUP)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    step = torch.where(largest == 0, torch.full_like(largest, 1e-6), largest / -8)
    codes = (blocks / step + 8.5).floor().clamp(0, 15).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, step.flatten()


class PeerGraph:
    """The model while it is written: nodes and weights in order."""

    def __init__(self, module: Any, capacity: int, *, last_only: bool = False) -> None:
        self.module, self.config, self.capacity = module, module.config, capacity
        self.last_only = last_only
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.inputs = [
            helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "S"]),
            helper.make_tensor_value_info("last", TensorProto.INT32, [1]),
            helper.make_tensor_value_info("total", TensorProto.INT32, []),
        ]
        vocabulary = [1, 1 if last_only else "S", self.config.vocab_size]
        self.outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, vocabulary)]

    def weight(self, name: str, value: Tensor) -> str:
        self.weights.append(numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return name

    def node(
        self, op: str, inputs: list[str], outputs: list[str], domain: str = MICROSOFT, **more: Any
    ) -> None:
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **more))

    def linear(self, x: str, weight: Tensor, out: str) -> None:
        codes, step = rounded(weight)
        inputs = [x, self.weight(f"{out}.codes", codes), self.weight(f"{out}.scales", step)]
        rows, columns = weight.shape
        sizes: dict[str, Any] = {"K": columns, "N": rows, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
        self.node("MatMulNBits", inputs, [out], **sizes)

    def norm(self, x: str, more: str, weight: Tensor, out: str) -> str:
        """Writes the norm of x + more as `out`; returns the name of the sum."""
        scale, total = self.weight(f"{out}.scale", weight), f"{out}.sum"
        epsilon = self.config.rms_norm_eps
        self.node("SkipSimplifiedLayerNormalization", [x, more, scale], [out, "", "", total], epsilon=epsilon)
        return total

    def attention(self, i: int, layer: Any, x: str) -> str:
        held = [1, self.config.num_key_value_heads, self.capacity, self.config.head_dim]
        names = [f"{kind}.{i}.{part}" for kind in ("past", "present") for part in ("key", "value")]
        rows = [helper.make_tensor_value_info(name, TensorProto.FLOAT, held) for name in names]
        self.inputs += rows[:2]
        self.outputs += rows[2:]
        a = layer.self_attn
        self.linear(x, torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]), f"qkv.{i}")
        given = [f"qkv.{i}", "", "", *names[:2], "last", "total", "cos", "sin"]
        heads: dict[str, Any] = {
            "num_heads": self.config.num_attention_heads,
            "kv_num_heads": held[1],
            "do_rotary": 1,
        }
        self.node("GroupQueryAttention", given, [f"attended.{i}", *names[2:]], **heads)
        self.linear(f"attended.{i}", a.o_proj.weight, f"o.{i}")
        return f"o.{i}"

    def mlp(self, i: int, layer: Any, x: str) -> str:
        self.linear(x, layer.mlp.gate_proj.weight, f"gate.{i}")
        self.linear(x, layer.mlp.up_proj.weight, f"up.{i}")
        self.node("Sigmoid", [f"gate.{i}"], [f"sigmoid.{i}"], domain="")
        self.node("Mul", [f"gate.{i}", f"sigmoid.{i}"], [f"silu.{i}"], domain="")
        self.node("Mul", [f"silu.{i}", f"up.{i}"], [f"gated.{i}"], domain="")
        self.linear(f"gated.{i}", layer.mlp.down_proj.weight, f"down.{i}")
        return f"down.{i}"

    def write(self, path: Path) -> None:
        """The whole model into one file."""
        model = self.module.model
        table = model.embed_tokens.weight
        cos, sin = model.rotary_emb(table[None, :1], torch.arange(self.capacity)[None])
        half = self.config.head_dim // 2
        self.weight("cos", cos[0, :, :half])
        self.weight("sin", sin[0, :, :half])
        self.node("Gather", [self.weight("table", table), "ids"], ["x"], domain="", axis=0)
        x, more = "x", ""
        for i, layer in enumerate(model.layers):
            if more:
                x = self.norm(x, more, layer.input_layernorm.weight, f"in.{i}")
            else:
                first = self.weight("in.0.scale", layer.input_layernorm.weight)
                epsilon = self.config.rms_norm_eps
                self.node(
                    "SimplifiedLayerNormalization", [x, first], ["in.0"], domain="", epsilon=epsilon, axis=-1
                )
            attended = self.attention(i, layer, f"in.{i}")
            x = self.norm(x, attended, layer.post_attention_layernorm.weight, f"middle.{i}")
            more = self.mlp(i, layer, f"middle.{i}")
        self.norm(x, more, model.norm.weight, "out")
        read = "out"
        if self.last_only:
            read, ends = "out.last", {"from": -1, "to": np.iinfo(np.int64).max, "axis": 1}
            names = [self.weight(f"last.{name}", torch.tensor([at])) for name, at in ends.items()]
            self.node("Slice", ["out", *names], [read], domain="")
        self.linear(read, self.module.lm_head.weight, "logits")
        graph = helper.make_graph(self.nodes, "peer", self.inputs, self.outputs, initializer=self.weights)
        imports = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
        onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), str(path))


def feed_of(tokens: np.ndarray[Any, Any], start: int) -> dict[str, Any]:
    """The inputs, but for keys and values, of a call with tokens [1, S] at positions from `start` on."""
    end = start + tokens.shape[1]
    return {"ids": tokens, "last": np.array([end - 1], np.int32), "total": np.array(end, np.int32)}


class Peer:
    """The graph in onnxruntime, its keys and values in buffers that it reads and writes."""

    def __init__(
        self, module: Any, folder: Path, capacity: int, threads: int, *, last_only: bool = False
    ) -> None:
        """`last_only`: a call computes the logits of its last token and no others."""
        import onnxruntime

        graph = PeerGraph(module, capacity, last_only=last_only)
        graph.write(folder / "peer.onnx")
        self.session = session(folder / "peer.onnx", threads=threads)
        self.binding = self.session.io_binding()
        shape = [1, graph.config.num_key_value_heads, capacity, graph.config.head_dim]
        self._buffers = []
        for name in (i.name for i in self.session.get_inputs() if i.name.startswith("past.")):
            held = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            self._buffers.append(held)
            self.binding.bind_ortvalue_input(name, held)
            self.binding.bind_ortvalue_output(name.replace("past.", "present."), held)

    def give(self, tokens: np.ndarray[Any, Any], start: int) -> None:
        """The next calls run tokens int64 [1, S] at positions from `start` on."""
        for name, value in feed_of(tokens, start).items():
            self.binding.bind_cpu_input(name, value)
        self.binding.bind_output("logits")  # of another size than before

    def run(self) -> None:
        """One call; its results stay in onnxruntime."""
        self.session.run_with_iobinding(self.binding)

    def logits(self, tokens: np.ndarray[Any, Any]) -> Tensor:
        """[1, S, vocabulary] of a text from its beginning."""
        self.give(tokens, 0)
        self.run()
        return torch.from_numpy(self.binding.get_outputs()[-1].numpy())
