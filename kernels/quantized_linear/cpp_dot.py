"""C++ of one row of x times blocks of 8 weight rows, read in several streams: the decode GEMV."""

from __future__ import annotations

from tilewright.kernels.quantized_linear import cpp_vnni, cpp_wide
from tilewright.kernels.quantized_linear.cpp_parts import STREAMS, Shape

_ADD_FOUR = """// 4 columns of 8 rows: a code in the low bits of 2^23 is a float once 2^23 is taken off.
inline void add_four(Int w, const float* x, Vec& sum) {
  const Int exponent = _mm256_set1_epi32(0x4B000000), high = _mm256_srli_epi32(w, 16);
  const Int low = _mm256_set1_epi32(0xFF), second = _mm256_set1_epi32(0xFF00);
  const Vec zero = vset(8388608.0f + MIDDLE), zero2 = vset(8388608.0f + 256 * MIDDLE);
  auto value = [&](Int v, Int mask, Vec off) {
    return _mm256_sub_ps(_mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(v, mask), exponent)), off);
  };
  sum = vfma(value(w, low, zero), vset(x[0]), sum);
  sum = vfma(value(w, second, zero2), vset(x[1]), sum);
  sum = vfma(value(high, low, zero), vset(x[2]), sum);
  sum = vfma(value(high, second, zero2), vset(x[3]), sum);
}

"""

_PRODUCTS = """inline Int products(Int w, Int a) { return PRODUCT; }
inline Int widen(Int sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
inline Int four(const int8_t* q) {  // 4 activations, for every row
  int32_t bits;
  std::memcpy(&bits, q, 4);
  return _mm256_set1_epi32(bits);
}

"""


def each(count: int, line: str) -> str:
    """A line for j = 0 .. count-1; `{j}` stands for the number."""
    return "\n".join(line.replace("{j}", str(j)) for j in range(count))


def unsigned(shape: Shape, codes: str) -> str:
    """Codes as 0..255, also those that are stored as signed."""
    return f"_mm256_xor_si256({codes}, _mm256_set1_epi8(-128))" if shape.bits == 8 else codes


def _products(shape: Shape) -> str:
    """products(weights, activations): 16 sums of two products, exact in 16 bits."""
    signed = "_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w))"
    return _PRODUCTS.replace("PRODUCT", signed if shape.bits == 8 else "_mm256_maddubs_epi16(w, a)")


def _chunk_steps(shape: Shape) -> str:
    """What one chunk of stream s adds to part[s]."""
    if not shape.is_integer:
        codes = unsigned(shape, "codes<{j}>(p[s])")
        return each(8, f"        add_four({codes}, row.x + c * 32 + {{j}} * 4, part[s]);")
    product = "products(codes<{j}>(p[s]), four(row.q + c * 32 + {j} * 4))"
    if shape.bits == 8:
        return each(8, f"        part[s] = _mm256_add_epi32(part[s], widen({product}));")
    first = f"        Int sum16 = {product.replace('{j}', '0')};\n"
    rest = each(8, f"        sum16 = _mm256_add_epi16(sum16, {product});").split("\n", 1)[1]
    return f"{first}{rest}\n        part[s] = _mm256_add_epi32(part[s], widen(sum16));"


def dot(shape: Shape) -> str:
    """One row of x times S blocks of 8 weight rows."""
    if shape.avx512:
        return cpp_vnni.dot(shape) if shape.is_integer else cpp_wide.dot(shape)
    if shape.is_integer:
        helper, zero, total = _products(shape), "_mm256_setzero_si256()", "Int"
        finish = "_mm256_cvtepi32_ps(_mm256_sub_epi32(part[s], _mm256_set1_epi32(row.shift[g])))"
        scale = "vmul(grid(tail), vset(row.scale[g]))"
    else:
        helper, zero, total = _ADD_FOUR.replace("MIDDLE", f"{shape.middle}.0f"), "vset(0.0f)", "Vec"
        finish, scale = "part[s]", "grid(tail)"
    lines = -(-32 * shape.bits // 64)
    fetch = each(
        lines, "        _mm_prefetch(reinterpret_cast<const char*>(p[s]) + kAhead + {j} * 64, _MM_HINT_T0);"
    )
    offset = (
        "\n      sum[s] = vfma(grid(tail + kGridBytes), vset(row.mass[g]), sum[s]);" if shape.offset else ""
    )
    return f"""{helper}// A row of x times S blocks of 8 rows: sum[s] holds the 8 results of block s.
template <int S>
inline void dot_blocks(const uint8_t* const* start, const Row& row, int64_t K32, Vec (&sum)[S]) {{
  const uint8_t* p[S];
  for (int s = 0; s < S; ++s) {{
    p[s] = start[s];
    sum[s] = vset(0.0f);
  }}
  for (int64_t g = 0, c = 0; c < K32; ++g) {{
    {total} part[S];
    for (int s = 0; s < S; ++s) part[s] = {zero};
    for (int64_t last = c + chunks_of(c, K32); c < last; ++c) {{
#pragma GCC unroll {STREAMS}
      for (int s = 0; s < S; ++s) {{
{fetch}
{_chunk_steps(shape)}
        p[s] += kChunkBytes;
      }}
    }}
#pragma GCC unroll {STREAMS}
    for (int s = 0; s < S; ++s) {{
      const uint8_t* tail = p[s];
      sum[s] = vfma({finish}, {scale}, sum[s]);{offset}
      p[s] += kTailBytes;
    }}
  }}
}}"""
