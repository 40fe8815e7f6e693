"""C++ for gated_mlp: one pass over gate and up, the activation inlined, elements shared among threads."""

from __future__ import annotations

from tilewright.kernels.common.cpp import ELEMENT, cpp_file, dtype_constant, require, vector_text
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
    dtype = dtype_constant(key.dtype)
    checks = "\n".join(
        (
            require(f"gate.is_cpu({dtype})", f"gate must be a {key.dtype} tensor on the CPU"),
            require(
                f"up.is_cpu({dtype}) && up.has_shape_of(gate)",
                "up must have the shape, dtype and device of gate",
            ),
        )
    )
    body = f"""using X = {ELEMENT[key.dtype]};

inline Vec activate(Vec g) {{ return {formula}; }}

void run(StableIValue* stack, uint64_t, uint64_t) {{
  Tensor gate(stack[0]);
  Tensor up(stack[1]);
{checks}
  gate.make_contiguous({dtype});
  up.make_contiguous({dtype});
  Tensor out(gate.sizes(), gate.dim(), {dtype});
  const X* g = gate.data<X>();
  const X* u = up.data<X>();
  X* o = out.mutable_data<X>();
  parallel_for(0, gate.numel(), {GRAIN}, [&](int64_t i, int64_t end) {{
    for (; i + kLanes <= end; i += kLanes) {{
      vstore(o + i, vmul(vround(g, activate(vload(g + i))), vload(u + i)));
    }}
    if (i < end) {{
      Vec a = vround(g, activate(vload_first(g + i, end - i)));
      vstore_first(o + i, vmul(a, vload_first(u + i, end - i)), end - i);
    }}
  }});
  stack[0] = out.release();
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
