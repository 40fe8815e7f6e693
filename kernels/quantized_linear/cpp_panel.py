"""C++ of many rows of x times an unpacked panel of 16 weight rows: the prefill GEMM."""

from __future__ import annotations

from tilewright.kernels.quantized_linear import cpp_vnni, cpp_wide
from tilewright.kernels.quantized_linear.cpp_dot import each, unsigned
from tilewright.kernels.quantized_linear.cpp_parts import Shape

INTEGER_TILE, FLOAT_TILE = 3, 6
"""Rows of x in registers, times 16 weight rows."""


def panel(shape: Shape) -> str:
    """unpack_block, and tile: R rows of x times a panel."""
    if shape.is_integer:
        product = cpp_vnni.tile(shape) if shape.avx512 else _integer_tile(shape)
        return f"{_integer_layout(shape)}\n\n{product}"
    return cpp_wide.panel(shape) if shape.avx512 else f"{_float_layout(shape)}\n\n{FLOAT_TILE_TEXT}"


FLOAT_TILE_TEXT = f"""template <int R>
inline void tile(const float* panel, const Row* rows, int64_t K32, Vec (&sum)[R][2]) {{
  Vec part[R][2];  // apart from memory that the panel might share: these stay in registers
  for (int m = 0; m < R; ++m) part[m][0] = part[m][1] = vset(0.0f);
  for (int64_t k = 0; k < K32 * 32; ++k) {{
    Vec b0 = vload(panel + k * 16), b1 = vload(panel + k * 16 + 8);
#pragma GCC unroll {FLOAT_TILE}
    for (int m = 0; m < R; ++m) {{
      Vec a = vset(rows[m].x[k]);
      part[m][0] = vfma(a, b0, part[m][0]);
      part[m][1] = vfma(a, b1, part[m][1]);
    }}
  }}
  for (int m = 0; m < R; ++m)
    for (int h = 0; h < 2; ++h) sum[m][h] = part[m][h];
}}"""


def _float_layout(shape: Shape) -> str:
    codes = unsigned(shape, "codes<{j}>(p)")
    zero = "grid(tail + kGridBytes)" if shape.offset else f"vmul(scale, vset(-{shape.middle}.0f))"
    return f"""constexpr int kTile = {FLOAT_TILE};
using Weights = float;
// A panel of 16 rows: [columns][16] dequantized.
inline int64_t panel_size(int64_t K32) {{ return K32 * 32 * 16; }}

inline void unpack_four(Int w, Vec scale, Vec zero, float* to) {{  // 4 columns of 8 rows
  for (int b = 0; b < 4; ++b) {{
    Int code = _mm256_and_si256(_mm256_srl_epi32(w, _mm_cvtsi32_si128(8 * b)), _mm256_set1_epi32(255));
    vstore(to + b * 16, vfma(_mm256_cvtepi32_ps(code), scale, zero));
  }}
}}

// Half of a panel from a block of 8 rows.
inline void unpack_block(const uint8_t* p, int64_t K32, float* to, int half) {{
  to += half * 8;
  for (int64_t c = 0; c < K32;) {{
    const int64_t chunks = chunks_of(c, K32);
    const uint8_t* tail = p + chunks * kChunkBytes;
    const Vec scale = grid(tail), zero = {zero};
    for (const int64_t last = c + chunks; c < last; ++c, p += kChunkBytes, to += 32 * 16) {{
{each(8, f"      unpack_four({codes}, scale, zero, to + {{j}} * 64);")}
    }}
    p = tail + kTailBytes;
  }}
}}"""


def _integer_layout(shape: Shape) -> str:
    keep = "\n    vstore(grids + 16, grid(tail + kGridBytes));" if shape.offset else ""
    codes = unsigned(shape, "codes<{j}>(p)") if shape.avx512 else "codes<{j}>(p)"
    store = f"      _mm256_storeu_si256(reinterpret_cast<Int*>(to + {{j}} * 64), {codes});"
    return f"""constexpr int kTile = {cpp_vnni.TILE if shape.avx512 else INTEGER_TILE};
constexpr int64_t kGridFloats = {32 if shape.offset else 16};  // 16 scales{", 16 offsets" * shape.offset}
using Weights = uint8_t;
// A panel of 16 rows: per group its scales{" and offsets" * shape.offset}, then its codes, a byte each.
inline int64_t panel_size(int64_t K32) {{ return K32 * 512 + groups_of(K32) * kGridFloats * 4; }}

// Half of a panel from a block of 8 rows.
inline void unpack_block(const uint8_t* p, int64_t K32, uint8_t* to, int half) {{
  for (int64_t c = 0; c < K32;) {{
    const int64_t chunks = chunks_of(c, K32);
    const uint8_t* tail = p + chunks * kChunkBytes;
    float* grids = reinterpret_cast<float*>(to) + half * 8;
    vstore(grids, grid(tail));{keep}
    to += kGridFloats * 4 + half * 32;
    for (const int64_t last = c + chunks; c < last; ++c, p += kChunkBytes, to += 512) {{
{each(8, store)}
    }}
    to -= half * 32;
    p = tail + kTailBytes;
  }}
}}"""


_WIDE_STEP = """          part[m][0] = _mm256_add_epi32(part[m][0], widen(products(b0, a)));
          part[m][1] = _mm256_add_epi32(part[m][1], widen(products(b1, a)));"""
_NARROW_STEP = """          Int y0 = products(b0, a), y1 = products(b1, a);
          near[m][0] = j ? _mm256_add_epi16(near[m][0], y0) : y0;
          near[m][1] = j ? _mm256_add_epi16(near[m][1], y1) : y1;"""
_NARROW_END = f"""
#pragma GCC unroll {INTEGER_TILE}
      for (int m = 0; m < R; ++m)
        for (int h = 0; h < 2; ++h) part[m][h] = _mm256_add_epi32(part[m][h], widen(near[m][h]));"""
_ADD_OFFSETS = """
      Vec mass = vset(rows[m].mass[g]);
      sum[m][0] = vfma(mass, vload(grids + 16), sum[m][0]);
      sum[m][1] = vfma(mass, vload(grids + 24), sum[m][1]);"""


def _integer_tile(shape: Shape) -> str:
    wide = shape.bits == 8
    begin, end = ("", "") if wide else ("\n      Int near[R][2];", _NARROW_END)
    return f"""template <int R>
inline void tile(const uint8_t* panel, const Row* rows, int64_t K32, Vec (&sum)[R][2]) {{
  for (int m = 0; m < R; ++m) sum[m][0] = sum[m][1] = vset(0.0f);
  for (int64_t g = 0, c = 0; c < K32; ++g) {{
    const float* grids = reinterpret_cast<const float*>(panel);
    panel += kGridFloats * 4;
    Int part[R][2];
    for (int m = 0; m < R; ++m) part[m][0] = part[m][1] = _mm256_setzero_si256();
    for (const int64_t last = c + chunks_of(c, K32); c < last; ++c, panel += 512) {{{begin}
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {{
        Int b0 = iload(panel + j * 64), b1 = iload(panel + j * 64 + 32);
#pragma GCC unroll {INTEGER_TILE}
        for (int m = 0; m < R; ++m) {{
          Int a = four(rows[m].q + c * 32 + j * 4);
{_WIDE_STEP if wide else _NARROW_STEP}
        }}
      }}{end}
    }}
    const Vec s0 = vload(grids), s1 = vload(grids + 8);
#pragma GCC unroll {INTEGER_TILE}
    for (int m = 0; m < R; ++m) {{
      Int shift = _mm256_set1_epi32(rows[m].shift[g]);
      Vec scale = vset(rows[m].scale[g]);
      Vec y0 = vmul(_mm256_cvtepi32_ps(_mm256_sub_epi32(part[m][0], shift)), scale);
      Vec y1 = vmul(_mm256_cvtepi32_ps(_mm256_sub_epi32(part[m][1], shift)), scale);
      sum[m][0] = vfma(y0, s0, sum[m][0]);
      sum[m][1] = vfma(y1, s1, sum[m][1]);{_ADD_OFFSETS if shape.offset else ""}
    }}
  }}
}}"""
