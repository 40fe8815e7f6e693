"""C++ of 16 small floats at a time, for AVX-512: what cpp_float.py has as 8 lanes for AVX2.

Codes of fp8 become float16 as there. Sixteen words of 8 codes of NVFP4 lie in one register: a shift brings
code j of every word into its low bits, by which a permutation picks the value. Those are columns j, 8 + j,
16 + j and so on, two neighbouring lanes to a scale; a row of x is laid out accordingly.
"""

from __future__ import annotations

from tilewright.compiler.float_format import E2M1, FloatFormat

AHEAD_BYTES = 2048
"""Prefetch distance in each stream."""

FEW = 20
"""So many rows of x at most meet codes as they are decoded: unpacking a panel costs more."""

_FP8 = """using Wide = __m512;
constexpr int64_t kStep = 1;  // chunks decoded together

HALVES

// 32 columns of a row.
inline void decode(const uint8_t* p, int64_t, Wide (&w)[2]) {
  const __m512i h = halves(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  w[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(h));
  w[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1));
}

inline int64_t span(int64_t K32) { return K32 * 32; }  // floats of a row of x
inline int64_t alike(int64_t c, int64_t K32) { return chunks_of(c, K32); }  // chunks of one scale, from c on

// What chunk c of a row, and the row as a whole, are multiplied by.
inline Wide scales(const uint8_t* row, int64_t K32, int64_t c) {
  return _mm512_set1_ps(scale_of(row, K32, INDEX));
}
inline float unit_of(const uint8_t*, int64_t) { return kUnit; }"""

_HALVES = {
    "fp8-e4m3": """// The bit below the sign is cleared: of a sign-extended code it is a copy of it.
inline __m512i halves(__m256i c) {
  return _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(c), 7), _mm512_set1_epi16(-16385));
}
constexpr float kUnit = 256.0f;  // what a decoded number is to be multiplied by""",
    "fp8-e5m2": """inline __m512i halves(__m256i c) { return _mm512_slli_epi16(_mm512_cvtepu8_epi16(c), 8); }
constexpr float kUnit = 1.0f;""",
}

_NVFP4 = f"""using Wide = __m512;
constexpr int64_t kStep = 4;  // chunks decoded together; those behind the last are read as zeros
constexpr float kUnit = 256.0f;  // what e4m3 as float16 is to be multiplied by

// 128 columns of a row, `left` chunks of which there are: lane i of w[j] is column 8 i + j.
inline void decode(const uint8_t* p, int64_t left, Wide (&w)[8]) {{
  const Wide table = _mm512_setr_ps({", ".join(f"{v}f" for v in (*E2M1, *(-v for v in E2M1)))});
  const __m512i words =
      left < 4 ? _mm512_maskz_loadu_epi32((1 << 4 * left) - 1, p) : _mm512_loadu_si512(p);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) w[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * j), table);
}}

inline int64_t span(int64_t K32) {{ return (K32 + 3) / 4 * 128; }}  // floats of a row of x
inline int64_t alike(int64_t, int64_t) {{ return kStep; }}  // chunks that `scales` holds for

// The e4m3 scales of 256 columns from chunk c on, and those of 128 of them as `decode` has the columns.
inline Wide sixteen(const uint8_t* row, int64_t K32, int64_t c, int64_t left) {{
  const uint8_t* p = row + fine_at(K32) + 2 * c;
  const __m128i codes = _mm_maskz_loadu_epi8(left < 8 ? (1 << 2 * left) - 1 : -1, p);
  const __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16(-16385)));
}}
inline Wide twice(Wide both, int first) {{
  const __m512i pairs = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return _mm512_permutexvar_ps(_mm512_add_epi32(pairs, _mm512_set1_epi32(first)), both);
}}

// What 128 columns from chunk c on, and the row as a whole, are multiplied by.
inline Wide scales(const uint8_t* row, int64_t K32, int64_t c) {{
  return twice(sixteen(row, K32, c, K32 - c), 0);
}}
inline float unit_of(const uint8_t* row, int64_t K32) {{ return kUnit * scale_of(row, K32, 0); }}"""

SETTLE = """// Columns of x as `decode` has those of a weight, zeros behind the last chunk.
inline void prepare(const Row& row, int64_t K32) {
  for (int64_t k = K32 * 32; k < span(K32); k += 8) vstore(row.x + k, vset(0.0f));
  for (int64_t k = 0; k < span(K32); k += 128) {
    float was[128];
    const float* eight[16];
    std::memcpy(was, row.x + k, sizeof was);
    for (int i = 0; i < 16; ++i) eight[i] = was + 8 * i;
    transpose8<16>(eight, 0, row.x + k);
    transpose8<16>(eight + 8, 0, row.x + k + 8);
  }
}"""

_HEAD = """// R weight rows times M rows of x: lane[m][r].
template <int R, int M>
inline void dot(const uint8_t* const* start, const Row* rows, int64_t K32, float (*lane)[8]) {
  Wide sum[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sum[r][m] = _mm512_setzero_ps();
"""
_TAIL = """
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) lane[m][r] = _mm512_reduce_add_ps(sum[r][m]) * (unit_of(start[r], K32)TOKEN);
}"""

_FP8_DOT = f"""{_HEAD}  for (int64_t c = 0; c < K32;) {{
    const int64_t first = c;
    Wide part[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) part[r][m] = _mm512_setzero_ps();
    for (const int64_t last = c + alike(c, K32); c < last; ++c)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {{
        const uint8_t* p = start[r] + c * kChunkBytes;
        _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead, _MM_HINT_T0);
        Wide w[2];
        decode(p, 1, w);
        for (int i = 0; i < 2; ++i)
          for (int m = 0; m < M; ++m)
            part[r][m] = _mm512_fmadd_ps(w[i], _mm512_loadu_ps(rows[m].x + c * 32 + i * 16), part[r][m]);
      }}
    for (int r = 0; r < R; ++r) {{
      const Wide scale = scales(start[r], K32, first);
      for (int m = 0; m < M; ++m) sum[r][m] = _mm512_fmadd_ps(part[r][m], scale, sum[r][m]);
    }}
  }}{_TAIL}"""

_NVFP4_DOT = f"""// 128 columns of a row times M rows of x.
template <int M>
inline void add_step(const uint8_t* p, int64_t left, Wide scale, const Row* rows, int64_t c,
                     Wide (&sum)[M]) {{
  Wide w[8], part[M];
  decode(p, left, w);
  for (int m = 0; m < M; ++m) part[m] = _mm512_mul_ps(w[0], _mm512_loadu_ps(rows[m].x + c * 32));
#pragma GCC unroll 8
  for (int j = 1; j < 8; ++j)
    for (int m = 0; m < M; ++m)
      part[m] = _mm512_fmadd_ps(w[j], _mm512_loadu_ps(rows[m].x + c * 32 + j * 16), part[m]);
  for (int m = 0; m < M; ++m) sum[m] = _mm512_fmadd_ps(part[m], scale, sum[m]);
}}

// 256 columns of R rows from chunk c on, or the `left` chunks of them that there are.
template <int R, int M>
inline void add_two(const uint8_t* const* start, const Row* rows, int64_t K32, int64_t c, int64_t left,
                    Wide (&sum)[R][M]) {{
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {{
    const uint8_t* p = start[r] + c * kChunkBytes;
    _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead + 64, _MM_HINT_T0);
    const Wide both = sixteen(start[r], K32, c, left);
    add_step<M>(p, left, twice(both, 0), rows, c, sum[r]);
    if (left > 4) add_step<M>(p + 64, left - 4, twice(both, 8), rows, c + 4, sum[r]);
  }}
}}

{_HEAD}  int64_t c = 0;
  for (; c + 8 <= K32; c += 8) add_two<R, M>(start, rows, K32, c, 8, sum);
  if (c < K32) add_two<R, M>(start, rows, K32, c, K32 - c, sum);{_TAIL}"""

PANEL = """using Weights = float;
// A panel of 16 rows: [columns][16] decoded.
inline int64_t panel_size(int64_t K32) { return span(K32) * 16; }

inline void unpack_block(const Weight& w, int64_t block, int64_t K32, float* to) {
  alignas(64) float wide[8][32 * kStep];
  const uint8_t* start[8];
  const float* rows[8];
  for (int r = 0; r < 8; ++r) {
    start[r] = row_of(w, block * 8 + r, K32);
    rows[r] = wide[r];
  }
  for (int64_t c = 0; c < K32;) {
    Wide scale[8];
    for (int r = 0; r < 8; ++r)
      scale[r] = _mm512_mul_ps(scales(start[r], K32, c), _mm512_set1_ps(unit_of(start[r], K32)));
    for (const int64_t last = c + alike(c, K32); c < last; c += kStep, to += 32 * 16 * kStep) {
      for (int r = 0; r < 8; ++r) {
        Wide v[2 * kStep];
        decode(start[r] + c * kChunkBytes, K32 - c, v);
        for (int i = 0; i < 2 * kStep; ++i) _mm512_store_ps(wide[r] + i * 16, _mm512_mul_ps(v[i], scale[r]));
      }
      for (int k = 0; k < 32 * kStep; k += 8) transpose8<16>(rows, k, to + k * 16);
    }
  }
}"""


def decode(form: FloatFormat) -> str:
    """`decode`, and what codes are multiplied by."""
    if form.is_nvfp4:
        return _NVFP4
    index = "c / kGroup" if form.group else "0"
    return _FP8.replace("HALVES", _HALVES[form.name]).replace("INDEX", index)


def dot(form: FloatFormat, token: str) -> str:
    """`dot`; `token`: by what of a row of x results are multiplied."""
    return (_NVFP4_DOT if form.is_nvfp4 else _FP8_DOT).replace("TOKEN", token)
