"""C++ for merge_parts: attentions over disjoint keys become one, row by row, the parts in their order."""

from __future__ import annotations

from tilewright.kernels.common.cpp import ELEMENT, cpp_file, dtype_constant, require, vector_text
from tilewright.kernels.common.family import config_of
from tilewright.runtime.contracts import KernelKey

SCHEMA = "(Tensor outs, Tensor lses) -> (Tensor, Tensor)"

_TEXT = """using T = @ELEMENT@;
constexpr int64_t E = @SIZE@;

void run(StableIValue* stack, uint64_t, uint64_t) {
  Tensor outs(stack[0]), lses(stack[1]);
@CHECKS@
  outs.make_contiguous(@DTYPE@);
  lses.make_contiguous(@FLOAT32@);
  const int64_t n = outs.sizes()[0], rows = outs.sizes()[1] * outs.sizes()[2];
  const int64_t sizes[4] = {1, outs.sizes()[1], outs.sizes()[2], E};
  Tensor out(sizes, 4, @FLOAT32@), lse(sizes, 3, @FLOAT32@);
  const T* from = outs.data<T>();
  const float* each = lses.data<float>();
  float *to = out.mutable_data<float>(), *log = lse.mutable_data<float>();
  parallel_for(0, rows, 1 + (1 << 15) / (n * E), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float most = std::numeric_limits<float>::lowest(), total = 0;
      for (int64_t i = 0; i < n; ++i) {
        const float x = each[i * rows + row];
        most = x > most || x != x ? x : most;
      }
      Vec sums[E / kLanes];
      for (Vec& x : sums) x = vset(0.0f);
      for (int64_t i = 0; i < n; ++i) {
        const float weight = std::exp(each[i * rows + row] - most);
        const T* part = from + (i * rows + row) * E;
        total += weight;
        for (int64_t e = 0; e < E / kLanes; ++e)
          sums[e] = vfma(vset(weight), vload(part + e * kLanes), sums[e]);
      }
      const Vec factor = vset(total == 0 ? 0 : 1 / total);
      for (int64_t e = 0; e < E / kLanes; ++e) vstore(to + row * E + e * kLanes, vmul(factor, sums[e]));
      log[row] = most + std::log(total);
    }
  });
  stack[0] = out.release();
  stack[1] = lse.release();
}"""


def generate(key: KernelKey, op: str) -> str:
    """The source for one configuration."""
    float32, dtype = dtype_constant("float32"), dtype_constant(key.dtype)
    checks = require(
        f"outs.is_cpu({dtype}) && lses.is_cpu({float32}) && outs.dim() == 4 && lses.dim() == 3 && "
        "outs.sizes()[0] > 0 && outs.sizes()[3] == E && lses.sizes()[0] == outs.sizes()[0] && "
        "lses.sizes()[1] == outs.sizes()[1] && lses.sizes()[2] == outs.sizes()[2]",
        "outs must be [n, H, T, E] and lses float32 [n, H, T]",
    )
    words = {"ELEMENT": ELEMENT[key.dtype], "SIZE": str(config_of(key)["value"]), "CHECKS": checks}
    text = _TEXT
    for name, word in (words | {"DTYPE": dtype, "FLOAT32": float32}).items():
        text = text.replace(f"@{name}@", word)
    return cpp_file(
        title=f"Attentions over disjoint keys merged, {key.dtype}, rows of {config_of(key)['value']}.",
        note="Sums run in float32.",
        target=str(key.target),
        vector=vector_text(key.target.arch, {key.dtype}),
        body=text,
        op=op,
        schema=SCHEMA,
        includes=("cmath", "limits"),
    )
