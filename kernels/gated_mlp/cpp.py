"""C++ for gated_mlp: one pass over gate and up, the activation inlined, elements shared among threads."""

from __future__ import annotations

from tilewright.kernels.common.cpp import ELEMENT, SCALAR_TYPE, check, cpp_file, vector_text
from tilewright.kernels.common.family import config_of
from tilewright.runtime.contracts import KernelKey

GRAIN = 8192
"""Elements a thread must get before a second one is woken."""

# The definition of each activation over one vector, with the snippets it uses.
ACTIVATION: dict[str, tuple[str, tuple[str, ...]]] = {
    "silu": ("vdiv(g, vadd(vset(1.0f), vexp(vneg(g))))", ("divide", "negate", "exp")),
    "sigmoid": ("vdiv(vset(1.0f), vadd(vset(1.0f), vexp(vneg(g))))", ("divide", "negate", "exp")),
    "relu": ("vmax(vset(0.0f), g)", ("max",)),
    "gelu": ("vmul(g, vnormal_cdf(g))", ("cdf",)),
    # 0.5 (1 + tanh u) = 1 / (1 + exp(-2u)), u = sqrt(2/pi) (g + 0.044715 g^3)
    "gelu_tanh": (
        "vdiv(g, vadd(vset(1.0f), vexp(vmul(g, "
        "vfma(vmul(g, g), vset(-0.0713548162726f), vset(-1.59576912161f))))))",
        ("divide", "exp"),
    ),
}
SCHEMA = "(Tensor gate, Tensor up) -> Tensor"


def generate(key: KernelKey, op: str) -> str:
    """The source file for one dtype and activation."""
    formula, needs = ACTIVATION[config_of(key)["activation"]]
    checks = "\n".join(
        (
            check("gate.is_cpu() && up.is_cpu()", "gate and up must be CPU tensors"),
            check(
                f"gate.scalar_type() == ScalarType::{SCALAR_TYPE[key.dtype]} && "
                "up.scalar_type() == gate.scalar_type()",
                f"gate and up must be {key.dtype}",
            ),
            check(
                "std::equal(gate.sizes().begin(), gate.sizes().end(), up.sizes().begin(), up.sizes().end())",
                "gate and up must have one shape",
            ),
        )
    )
    body = f"""using X = {ELEMENT[key.dtype]};

inline Vec activate(Vec g) {{ return {formula}; }}

Tensor run(Tensor gate, Tensor up) {{
{checks}
  gate = contiguous(gate);  // no copy when it is
  up = contiguous(up);
  Tensor out = new_empty(gate, gate.sizes());
  const X* g = static_cast<const X*>(gate.const_data_ptr());
  const X* u = static_cast<const X*>(up.const_data_ptr());
  X* o = static_cast<X*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, gate.numel(), {GRAIN}, [&](int64_t i, int64_t end) {{
    for (; i + kLanes <= end; i += kLanes) {{
      vstore(o + i, vmul(vround(g, activate(vload(g + i))), vload(u + i)));
    }}
    if (i < end) {{
      Vec a = vround(g, activate(vload_first(g + i, end - i)));
      vstore_first(o + i, vmul(a, vload_first(u + i, end - i)), end - i);
    }}
  }});
  return out;
}}"""
    return cpp_file(
        title=f"{config_of(key)['activation']}(gate) * up, elementwise.",
        note="Inputs that are not contiguous are copied first.",
        target=str(key.target),
        vector=vector_text(key.target.arch, {"partial", key.dtype, *needs}),
        body=body,
        op=op,
        schema=SCHEMA,
    )
