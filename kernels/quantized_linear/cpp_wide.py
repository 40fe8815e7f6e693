"""C++ of 16 floats at a time, for AVX-512 and activations as they are: the decode GEMV and the prefill GEMM.

A code of at most 4 bits picks its value out of a register that holds all of them, by its low bits alone: a
shift and a permutation give 16 weights. A code of 8 bits lies in the low bits of 2^23. The packed form is
that of the AVX2 kernels: two of its vectors of 8 rows and 4 columns make one of 512 bits.
"""

from __future__ import annotations

from tilewright.kernels.quantized_linear.cpp_parts import STREAMS, Shape
from tilewright.kernels.quantized_linear.cpp_vnni import AHEAD_BYTES, wide_codes

TILE = 12
"""Rows of x in registers, times 16 weight rows."""

_BYTE = """// What `value` needs of a format.
inline __m512 values() { return _mm512_set1_ps(8388608.0f + MIDDLE.0f); }

// The weights of byte b of every word: column b of two groups of four columns, 8 rows each.
template <int i, int b>
inline __m512 value(const uint8_t* p, __m512 of) {
  const Wide word = _mm512_srli_epi32(wide_codes<i>(p), 8 * b);
  const Wide low = _mm512_set1_epi32(255), exponent = _mm512_set1_epi32(0x4B000000);
  const Wide whole = _mm512_ternarylogic_epi32(word, low, exponent, 0xEA);  // word & low | exponent
  return _mm512_sub_ps(_mm512_castsi512_ps(whole), of);
}"""

_PICK = """// The value of every code.
inline __m512 values() { return _mm512_setr_ps(LIST); }

// The weights of byte b of every word: column b of two groups of four columns, 8 rows each.
template <int i, int b>
inline __m512 value(const uint8_t* p, __m512 of) {
  return _mm512_permutexvar_ps(WORD, of);
}"""


def _value(shape: Shape) -> str:
    if shape.bits == 8:
        return _BYTE.replace("MIDDLE", str(shape.middle))
    numbers = ", ".join(str(code % (1 << shape.bits) - shape.middle) for code in range(16))
    word = "_mm512_srli_epi32(wide_codes<i>(p), 8 * b)"
    if shape.bits == 4:  # of the word as it lies: more bits than four are not looked at
        word = "_mm512_srli_epi32(_mm512_loadu_si512(p + 64 * (i / 2)), 8 * b + 4 * (i % 2))"
    return _PICK.replace("LIST", numbers).replace("WORD", word)


def dot(shape: Shape) -> str:
    """One row of x times S blocks of 8 weight rows, in several streams."""
    lines = -(-32 * shape.bits // 64)
    fetch = "\n".join(
        f"        _mm_prefetch(reinterpret_cast<const char*>(p[s]) + {AHEAD_BYTES + 64 * j}, _MM_HINT_T0);"
        for j in range(lines)
    )
    steps = "\n".join(f"      column<{i}, {b}>(p, x, of, part);" for i in range(4) for b in range(4))
    offset = (
        "\n      sum[s] = vfma(grid(tail + kGridBytes), vset(row.mass[g]), sum[s]);" if shape.offset else ""
    )
    return f"""{wide_codes(shape)}

{_value(shape)}

// Two columns of a chunk of x times those of S blocks.
template <int i, int b, int S>
inline void column(const uint8_t* const (&p)[S], const float* x, __m512 of, __m512 (&part)[S][2]) {{
  const __m512 a = _mm512_mask_broadcastss_ps(_mm512_set1_ps(x[place<i>[0] * 4 + b]), 0xFF00,
                                              _mm_load_ss(x + place<i>[1] * 4 + b));
#pragma GCC unroll {STREAMS}
  for (int s = 0; s < S; ++s) part[s][b % 2] = _mm512_fmadd_ps(value<i, b>(p[s], of), a, part[s][b % 2]);
}}

// A row of x times S blocks of 8 rows: sum[s] holds the 8 results of block s.
template <int S>
inline void dot_blocks(const uint8_t* const* start, const Row& row, int64_t K32, Vec (&sum)[S]) {{
  const __m512 of = values();
  const uint8_t* p[S];
  for (int s = 0; s < S; ++s) {{
    p[s] = start[s];
    sum[s] = vset(0.0f);
  }}
  for (int64_t g = 0, c = 0; c < K32; ++g) {{
    __m512 part[S][2];
    for (int s = 0; s < S; ++s) part[s][0] = part[s][1] = _mm512_setzero_ps();
    for (int64_t last = c + chunks_of(c, K32); c < last; ++c) {{
      const float* x = row.x + c * 32;
#pragma GCC unroll {STREAMS}
      for (int s = 0; s < S; ++s) {{
{fetch}
      }}
{steps}
#pragma GCC unroll {STREAMS}
      for (int s = 0; s < S; ++s) p[s] += kChunkBytes;
    }}
#pragma GCC unroll {STREAMS}
    for (int s = 0; s < S; ++s) {{
      const uint8_t* tail = p[s];
      const __m512 both = _mm512_add_ps(part[s][0], part[s][1]);
      const Vec all = vadd(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1));
      sum[s] = vfma(all, grid(tail), sum[s]);{offset}
      p[s] += kTailBytes;
    }}
  }}
}}"""


def panel(shape: Shape) -> str:
    """unpack_block, and tile: R rows of x times a panel of 16 weight rows."""
    zero = "twice(grid(tail + kGridBytes))" if shape.offset else "_mm512_setzero_ps()"
    steps = "\n".join(
        f"      unpack_two<{i}, {b}>(p, of, scale, zero, to);" for i in range(4) for b in range(4)
    )
    return f"""constexpr int kTile = {TILE};
using Weights = float;
// A panel of 16 rows: [columns][16] dequantized.
inline int64_t panel_size(int64_t K32) {{ return K32 * 32 * 16; }}

inline __m512 twice(Vec a) {{ return _mm512_insertf32x8(_mm512_castps256_ps512(a), a, 1); }}

// 2 columns of 8 rows.
template <int i, int b>
inline void unpack_two(const uint8_t* p, __m512 of, __m512 scale, __m512 zero, float* to) {{
  const __m512 w = _mm512_fmadd_ps(value<i, b>(p, of), scale, zero);
  vstore(to + (place<i>[0] * 4 + b) * 16, _mm512_castps512_ps256(w));
  vstore(to + (place<i>[1] * 4 + b) * 16, _mm512_extractf32x8_ps(w, 1));
}}

// Half of a panel from a block of 8 rows.
inline void unpack_block(const uint8_t* p, int64_t K32, float* to, int half) {{
  const __m512 of = values();
  to += half * 8;
  for (int64_t c = 0; c < K32;) {{
    const int64_t chunks = chunks_of(c, K32);
    const uint8_t* tail = p + chunks * kChunkBytes;
    const __m512 scale = twice(grid(tail)), zero = {zero};
    for (const int64_t last = c + chunks; c < last; ++c, p += kChunkBytes, to += 32 * 16) {{
{steps}
    }}
    p = tail + kTailBytes;
  }}
}}

{TILE_TEXT.replace("COLUMNS", "K32 * 32")}"""


TILE_TEXT = f"""template <int R>
inline void tile(const float* panel, const Row* rows, int64_t K32, Vec (&sum)[R][2]) {{
  __m512 sum16[R];
  for (int m = 0; m < R; ++m) sum16[m] = _mm512_setzero_ps();
  for (int64_t k = 0; k < COLUMNS; ++k) {{
    const __m512 b = _mm512_loadu_ps(panel + k * 16);
#pragma GCC unroll {TILE}
    for (int m = 0; m < R; ++m) sum16[m] = _mm512_fmadd_ps(_mm512_set1_ps(rows[m].x[k]), b, sum16[m]);
  }}
  for (int m = 0; m < R; ++m) {{
    sum[m][0] = _mm512_castps512_ps256(sum16[m]);
    sum[m][1] = _mm512_extractf32x8_ps(sum16[m], 1);
  }}
}}"""
