"""C++ for hadamard: one block of channels at a time in a buffer that stays in the first cache levels."""

from __future__ import annotations

from tilewright.kernels.common.cpp import ELEMENT, LANES, cpp_file, dtype_constant, require, vector_text
from tilewright.kernels.common.family import config_of
from tilewright.runtime.contracts import KernelKey

MAX_BLOCK = 32768
"""Largest block of channels: two buffers of this many floats lie on a thread's stack."""
GRAIN = 16384
"""Elements a thread must get before a second one is woken."""
_TILE = 4
"""Rows of the dense factor that are summed at once, in registers."""

# Lanes swapped with their partner 1, 2, 4, 8 lanes away.
_SWAP = {
    "avx2": {
        1: "_mm256_permute_ps(v, 0xB1)",
        2: "_mm256_permute_ps(v, 0x4E)",
        4: "_mm256_permute2f128_ps(v, v, 1)",
    },
    "avx512": {
        1: "_mm512_permute_ps(v, 0xB1)",
        2: "_mm512_permute_ps(v, 0x4E)",
        4: "_mm512_shuffle_f32x4(v, v, 0xB1)",
        8: "_mm512_shuffle_f32x4(v, v, 0x4E)",
    },
}


def schema(key: KernelKey) -> str:
    """The kernel op's arguments; what is off is absent."""
    config = config_of(key)
    names = ["x", *(["base"] if config["order"] > 1 else []), *(["signs"] if config["signs"] else [])]
    return f"({', '.join(f'Tensor {name}' for name in names)}) -> Tensor"


def _butterflies(key: KernelKey) -> str:
    """In place on one segment of kPower floats: lanes first, then whole vectors."""
    lanes, power = LANES[key.target.arch], config_of(key)["block"] // config_of(key)["order"]
    if power < lanes:
        return """// Sylvester's matrix on kPower values.
inline void butterflies(float* v) {
  for (int64_t h = 1; h < kPower; h *= 2) {
    for (int64_t i = 0; i < kPower; i += 2 * h) {
      for (int64_t j = i; j < i + h; ++j) {
        const float low = v[j], high = v[j + h];
        v[j] = low + high;
        v[j + h] = low - high;
      }
    }
  }
}"""
    steps = []
    for h in (h for h in (1, 2, 4, 8) if h < lanes):
        signs = ", ".join("-1.0f" if i & h else "1.0f" for i in range(lanes))
        steps.append(f"    static const float sign{h}[kLanes] = {{{signs}}};")
        steps.append(f"    v = vfma(v, vload(sign{h}), {_SWAP[key.target.arch][h]});")
    inner = "\n".join(steps)
    return f"""// Sylvester's matrix on kPower values.
inline void butterflies(float* data) {{
  for (int64_t i = 0; i < kPower; i += kLanes) {{
    Vec v = vload(data + i);
{inner}
    vstore(data + i, v);
  }}
  for (int64_t h = kLanes; h < kPower; h *= 2) {{
    for (int64_t i = 0; i < kPower; i += 2 * h) {{
      for (int64_t j = i; j < i + h; j += kLanes) {{
        const Vec low = vload(data + j), high = vload(data + j + h);
        vstore(data + j, vadd(low, high));
        vstore(data + j + h, vfma(high, vset(-1.0f), low));
      }}
    }}
  }}
}}"""


def _dense(key: KernelKey) -> str:
    """out[j] = sum over k of in[k] base[k, j] for segments in[k], out[j] of kPower floats."""
    config = config_of(key)
    place = "(j + t) * kOrder + k" if config["inverse"] else "k * kOrder + j + t"
    vector = config["block"] // config["order"] >= LANES[key.target.arch]
    step, zero = ("kLanes", "vset(0.0f)") if vector else ("1", "0.0f")
    kind, load = ("Vec", "vload(in + k * kPower + p)") if vector else ("float", "in[k * kPower + p]")
    add = f"vfma(v, vset(base[{place}]), sums[t])" if vector else f"v * base[{place}] + sums[t]"
    store = "vstore(out + (j + t) * kPower + p, sums[t])" if vector else "out[(j + t) * kPower + p] = sums[t]"
    return f"""// The dense factor [kOrder, kOrder] across segments.
inline void dense(const float* in, const float* base, float* out) {{
  for (int64_t p = 0; p < kPower; p += {step}) {{
    for (int64_t j = 0; j < kOrder; j += {_TILE}) {{
      {kind} sums[{_TILE}] = {{{", ".join([zero] * _TILE)}}};
      for (int64_t k = 0; k < kOrder; ++k) {{
        const {kind} v = {load};
        for (int t = 0; t < {_TILE}; ++t) {{
          sums[t] = {add};
        }}
      }}
      for (int t = 0; t < {_TILE}; ++t) {{
        {store};
      }}
    }}
  }}
}}"""


def _block(key: KernelKey) -> str:
    """Load, transform, store one block; the ends are scalar where a block is no whole number of vectors."""
    config = config_of(key)
    first = config["signs"] and not config["inverse"]
    last = config["signs"] and config["inverse"]
    params = ["const X* x", *(["const float* base"] if config["order"] > 1 else [])]
    params += [*(["const float* signs"] if config["signs"] else []), "X* y"]
    load, load_part = "vload(x + i)", "vload_first(x + i, kBlock - i)"
    if first:
        load = f"vmul({load}, vload(signs + i))"
        load_part = f"vmul({load_part}, vload_first(signs + i, kBlock - i))"
    result = "b" if config["order"] > 1 else "a"
    out, out_part = f"vmul(vload({result} + i), scale)", f"vmul(vload_first({result} + i, kBlock - i), scale)"
    if last:
        out, out_part = (
            f"vmul({out}, vload(signs + i))",
            f"vmul({out_part}, vload_first(signs + i, kBlock - i))",
        )
    dense = "\n  alignas(64) float b[kBlock];\n  dense(a, base, b);" if config["order"] > 1 else ""
    return f"""inline void block({", ".join(params)}) {{
  alignas(64) float a[kBlock];
  int64_t i = 0;
  for (; i + kLanes <= kBlock; i += kLanes) {{
    vstore(a + i, {load});
  }}
  if (i < kBlock) {{
    vstore_first(a + i, {load_part}, kBlock - i);
  }}
  for (int64_t k = 0; k < kOrder; ++k) {{
    butterflies(a + k * kPower);
  }}{dense}
  const Vec scale = vset(kScale);
  for (i = 0; i + kLanes <= kBlock; i += kLanes) {{
    vstore(y + i, {out});
  }}
  if (i < kBlock) {{
    vstore_first(y + i, {out_part}, kBlock - i);
  }}
}}"""


def _run(key: KernelKey) -> str:
    config = config_of(key)
    names = ["x", *(["base"] if config["order"] > 1 else []), *(["signs"] if config["signs"] else [])]
    dtype = dtype_constant(key.dtype)
    lines = [f"  Tensor {name}(stack[{i}]);" for i, name in enumerate(names)]
    lines += [
        require(f"x.is_cpu({dtype})", f"x must be a {key.dtype} tensor on the CPU"),
        require(
            "x.dim() >= 1 && x.sizes()[x.dim() - 1] % kBlock == 0",
            f"the last axis of x must be a multiple of {config['block']}",
        ),
        "  const int64_t D = x.sizes()[x.dim() - 1];",
    ]
    float32 = dtype_constant("float32")
    if "base" in names:
        shape = "base.dim() == 2 && base.sizes()[0] == kOrder && base.sizes()[1] == kOrder"
        lines.append(
            require(f"base.is_cpu({float32}) && {shape}", f"base must be float32 [{config['order']}] squared")
        )
    if "signs" in names:
        shape = "signs.dim() == 1 && signs.sizes()[0] == D"
        lines.append(require(f"signs.is_cpu({float32}) && {shape}", "signs must be float32 of x's last axis"))
    lines += [f"  {name}.make_contiguous({dtype if name == 'x' else float32});" for name in names]
    lines += [f"  Tensor y(x.sizes(), x.dim(), {dtype});", "  const X* from = x.data<X>();"]
    lines += ["  X* to = y.mutable_data<X>();"]
    lines += [f"  const float* {n}_data = {n}.data<float>();" for n in names[1:]]
    call = ["from + n * kBlock", *(["base_data"] if "base" in names else [])]
    call += [*(["signs_data + n % per_row * kBlock"] if "signs" in names else []), "to + n * kBlock"]
    body = "\n".join(lines)
    return f"""void run(StableIValue* stack, uint64_t, uint64_t) {{
{body}
  const int64_t per_row = D / kBlock, grain = kBlock < {GRAIN} ? {GRAIN} / kBlock : 1;
  parallel_for(0, x.numel() / kBlock, grain, [&](int64_t first, int64_t last) {{
    for (int64_t n = first; n < last; ++n) {{
      block({", ".join(call)});
    }}
  }});
  stack[0] = y.release();
}}"""


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration: block, dense order, signs, direction."""
    config = config_of(key)
    block, order = config["block"], config["order"]
    constants = f"""using X = {ELEMENT[key.dtype]};
constexpr int64_t kBlock = {block}, kOrder = {order}, kPower = {block // order};
constexpr float kScale = {block**-0.5!r}f;"""
    parts = [constants, _butterflies(key), *([_dense(key)] if order > 1 else []), _block(key), _run(key)]
    what = "the inverse of x diag(signs) H" if config["inverse"] else "x diag(signs) H"
    if not config["signs"]:
        what = what.replace(" diag(signs)", "")
    return cpp_file(
        title=f"{what} / sqrt({block}) in blocks of {block}: base [{order}] x Sylvester [{block // order}].",
        note="Inputs that are not contiguous are copied first.",
        target=str(key.target),
        vector=vector_text(key.target.arch, {"partial", key.dtype}),
        body="\n\n".join(parts),
        op=op,
        schema=schema(key),
    )
