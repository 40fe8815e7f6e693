"""C++ of integer products by vpdpbusd, for AVX-512 with VNNI: the decode GEMV and the prefill GEMM.

One instruction adds four products of an unsigned code and an activation to each of 16 sums in 32 bits, so
nothing is widened and nothing can saturate. Codes of 8 bits are taken as 0..255; what their middle adds is
taken off with the sum of the activations, modulo 2^32 and therefore exactly. The packed form is that of the
AVX2 kernels: two of its vectors of 8 rows and 4 columns make one of 512 bits.
"""

from __future__ import annotations

from tilewright.kernels.quantized_linear.cpp_parts import STREAMS, Shape

TILE = 8
"""Rows of x in registers, times 16 weight rows."""
AHEAD_BYTES = 2048
"""Prefetch distance in each stream: these processors ask for more lines at a time."""

_PAIRS = {8: "2 * i, 2 * i + 1", 4: "i / 2 * 4 + i % 2, i / 2 * 4 + i % 2 + 2"}
_LOADS = {
    8: "  return _mm512_xor_si512(_mm512_loadu_si512(p + 64 * i), _mm512_set1_epi8(-128));",
    4: """  const Wide pair = _mm512_loadu_si512(p + 64 * (i / 2));
  return _mm512_and_si512(i % 2 ? _mm512_srli_epi16(pair, 4) : pair, _mm512_set1_epi8(15));""",
    2: """  const Wide four = _mm512_loadu_si512(p);
  return _mm512_and_si512(_mm512_srli_epi16(four, 2 * i), _mm512_set1_epi8(3));""",
    3: """  const Wide four = _mm512_loadu_si512(p);
  const Wide low = _mm512_and_si512(_mm512_srli_epi16(four, 2 * i), _mm512_set1_epi8(3));
  const Int third = iload(p + 64);
  const Wide bits = _mm512_inserti64x4(_mm512_castsi256_si512(third), _mm256_srli_epi16(third, 4), 1);
  const Wide moved = i < 2 ? _mm512_slli_epi16(bits, i < 2 ? 2 - i : 0)
                           : _mm512_srli_epi16(bits, i < 2 ? 0 : i - 2);
  return _mm512_or_si512(low, _mm512_and_si512(moved, _mm512_set1_epi8(4)));""",
}


def wide_codes(shape: Shape) -> str:
    """wide_codes<i>: two vectors of a chunk at once; place<i>: which."""
    return f"""using Wide = __m512i;

// Two vectors of a chunk side by side, as 0..255.
template <int i>
inline Wide wide_codes(const uint8_t* p) {{
{_LOADS[shape.bits]}
}}

// Which those are.
template <int i>
constexpr int place[2] = {{{_PAIRS.get(shape.bits, "i, i + 4")}}};"""


_SPREAD = """// The activations of two vectors: four columns of the first for 8 rows, then four of the second.
template <int i>
inline Wide spread(Wide q) {
  const Wide from = _mm512_inserti64x4(_mm512_set1_epi32(place<i>[0]), _mm256_set1_epi32(place<i>[1]), 1);
  return _mm512_permutexvar_epi32(from, q);
}"""


def dot(shape: Shape) -> str:
    """One row of x times S blocks of 8 weight rows, in several streams."""
    lines = -(-32 * shape.bits // 64)
    fetch = "\n".join(
        f"        _mm_prefetch(reinterpret_cast<const char*>(p[s]) + {AHEAD_BYTES + 64 * j}, _MM_HINT_T0);"
        for j in range(lines)
    )
    steps = "\n".join(
        f"        part[s] = _mm512_dpbusd_epi32(part[s], wide_codes<{i}>(p[s]), a[{i}]);" for i in range(4)
    )
    offset = (
        "\n      sum[s] = vfma(grid(tail + kGridBytes), vset(row.mass[g]), sum[s]);" if shape.offset else ""
    )
    return f"""{wide_codes(shape)}

{_SPREAD}

// A row of x times S blocks of 8 rows: sum[s] holds the 8 results of block s.
template <int S>
inline void dot_blocks(const uint8_t* const* start, const Row& row, int64_t K32, Vec (&sum)[S]) {{
  const uint8_t* p[S];
  for (int s = 0; s < S; ++s) {{
    p[s] = start[s];
    sum[s] = vset(0.0f);
  }}
  for (int64_t g = 0, c = 0; c < K32; ++g) {{
    Wide part[S];
    for (int s = 0; s < S; ++s) part[s] = _mm512_setzero_si512();
    for (int64_t last = c + chunks_of(c, K32); c < last; ++c) {{
      const Wide q = _mm512_castsi256_si512(iload(row.q + c * 32));
      const Wide a[4] = {{spread<0>(q), spread<1>(q), spread<2>(q), spread<3>(q)}};
#pragma GCC unroll {STREAMS}
      for (int s = 0; s < S; ++s) {{
{fetch}
{steps}
        p[s] += kChunkBytes;
      }}
    }}
    const Int shift = _mm256_set1_epi32(row.shift[g]);
    const Vec scale = vset(row.scale[g]);
#pragma GCC unroll {STREAMS}
    for (int s = 0; s < S; ++s) {{
      const uint8_t* tail = p[s];
      const Int high = _mm512_extracti64x4_epi64(part[s], 1);
      const Int all = _mm256_add_epi32(_mm512_castsi512_si256(part[s]), high);
      const Vec value = _mm256_cvtepi32_ps(_mm256_sub_epi32(all, shift));
      sum[s] = vfma(value, vmul(grid(tail), scale), sum[s]);{offset}
      p[s] += kTailBytes;
    }}
  }}
}}"""


_ADD_OFFSETS = """
      sum16[m] = _mm512_fmadd_ps(_mm512_set1_ps(rows[m].mass[g]), _mm512_loadu_ps(grids + 16), sum16[m]);"""


def tile(shape: Shape) -> str:
    """R rows of x times an unpacked panel of 16 weight rows, whose codes are 0..255."""
    return f"""template <int R>
inline void tile(const uint8_t* panel, const Row* rows, int64_t K32, Vec (&sum)[R][2]) {{
  __m512 sum16[R];
  for (int m = 0; m < R; ++m) sum16[m] = _mm512_setzero_ps();
  for (int64_t g = 0, c = 0; c < K32; ++g) {{
    const float* grids = reinterpret_cast<const float*>(panel);
    panel += kGridFloats * 4;
    Wide part[R];
    for (int m = 0; m < R; ++m) part[m] = _mm512_setzero_si512();
    for (const int64_t last = c + chunks_of(c, K32); c < last; ++c, panel += 512) {{
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {{
        const Wide b = _mm512_loadu_si512(panel + j * 64);
#pragma GCC unroll {TILE}
        for (int m = 0; m < R; ++m) {{
          int32_t four;
          std::memcpy(&four, rows[m].q + c * 32 + j * 4, 4);
          part[m] = _mm512_dpbusd_epi32(part[m], b, _mm512_set1_epi32(four));
        }}
      }}
    }}
    const __m512 scales = _mm512_loadu_ps(grids);
#pragma GCC unroll {TILE}
    for (int m = 0; m < R; ++m) {{
      const Wide all = _mm512_sub_epi32(part[m], _mm512_set1_epi32(rows[m].shift[g]));
      const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(all), _mm512_set1_ps(rows[m].scale[g]));
      sum16[m] = _mm512_fmadd_ps(value, scales, sum16[m]);{_ADD_OFFSETS if shape.offset else ""}
    }}
  }}
  for (int m = 0; m < R; ++m) {{
    sum[m][0] = _mm512_castps512_ps256(sum16[m]);
    sum[m][1] = _mm512_extractf32x8_ps(sum16[m], 1);
  }}
}}"""
