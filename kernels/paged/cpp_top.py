"""C++ for top_pages: the places of the greatest bounds of each row."""

from __future__ import annotations

from tilewright.kernels.common.cpp import cpp_file, dtype_constant, require, vector_text
from tilewright.runtime.contracts import KernelKey

TOP = """// Orders floats as integers: -inf first, NaN last.
inline uint32_t rank_of(float x) {
  if (x != x) return UINT32_MAX;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (bits == 0x80000000u) bits = 0;  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The places of the `some` greatest of n bounds, ascending, without those of -inf; -1 at the end instead.
void top(const float* from, int64_t n, int64_t some, std::vector<uint64_t>& order, int32_t* to) {
  const uint32_t none = rank_of(-std::numeric_limits<float>::infinity());
  order.resize(n);  // by bound, of equal ones the first is greatest
  for (int64_t i = 0; i < n; ++i) order[i] = static_cast<uint64_t>(rank_of(from[i])) << 32 | (UINT32_MAX - i);
  std::nth_element(order.begin(), order.begin() + some, order.end(), std::greater<uint64_t>());
  int32_t* last = to;
  for (int64_t i = 0; i < some; ++i)
    if (order[i] >> 32 != none) *last++ = UINT32_MAX - static_cast<uint32_t>(order[i]);
  std::sort(to, last);
  std::fill(last, to + some, -1);
}"""
"""What finds the greatest of a row."""

_TEXT = """void run(StableIValue* stack, uint64_t, uint64_t) {
  Tensor bounds(stack[0]);
  const int64_t count = static_cast<int64_t>(stack[1]);
@CHECKS@
  bounds.make_contiguous(@FLOAT32@);
  const int64_t B = bounds.sizes()[0], Hkv = bounds.sizes()[1], n = bounds.sizes()[2];
  const int64_t some = count < n ? count : n, sizes[3] = {B, Hkv, some};
  Tensor out(sizes, 3, @INT32@);
  const float* from = bounds.data<float>();
  int32_t* to = out.mutable_data<int32_t>();
  parallel_for(0, B * Hkv, 1 + (1 << 14) / (n + 1), [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> order;
    for (int64_t row = begin; row < end; ++row) top(from + row * n, n, some, order, to + row * some);
  });
  stack[0] = out.release();
}"""


def generate(key: KernelKey, op: str) -> str:
    """The source; it does not depend on sizes."""
    float32 = dtype_constant("float32")
    checks = require(
        f"bounds.is_cpu({float32}) && bounds.dim() == 3 && count > 0",
        "bounds must be float32 [B, Hkv, n] and count positive",
    )
    text = f"{TOP}\n\n{_TEXT}".replace("@CHECKS@", checks).replace("@FLOAT32@", float32)
    return cpp_file(
        title="The places of the greatest bounds of each row.",
        note="Of equal bounds the first are taken.",
        target=str(key.target),
        vector=vector_text(key.target.arch, ()),
        body=text.replace("@INT32@", dtype_constant("int32")),
        op=op,
        schema="(Tensor bounds, int count) -> Tensor",
        includes=("algorithm", "functional", "limits", "vector"),
    )
