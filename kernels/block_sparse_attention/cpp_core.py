"""C++ of the block-sparse attention core: micro-kernel, softmax, packing, and the walk over key blocks.

The recipe. K is packed once per head into panels of two vectors of keys ([panel][D][kNR]), V into pieces of
at most kKeys keys ([E / kNR][keys][kNR]); q rows are scaled by scale * log2(e). A task is up to kQRows query
rows of one block; per piece it takes kRows of them at a time, so that their scores stay in L1: products with
register tiles of kMR x 2 vectors, exp2 by a polynomial, products with V. The running maximum of a row moves
only when a score exceeds it by more than kSlack (a factor 2^8 costs float32 nothing), and what that rescales
is folded into the load of the accumulators. Pieces that a predicate cuts are clipped to the panels the rows
can reach and masked element by element there; whole pieces have no mask arithmetic.
"""

from __future__ import annotations

from tilewright.compiler.block_layout import Kind

EMPTY = "-1e30f"
ISA_TEXT = {
    "avx2": """inline Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline bool any_above(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
inline float vmaximum(Vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline Vec viota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
inline Vec vexp2(Vec x) {  // x <= 127; relative error 1e-7, exactly 0 from -127 on
  x = vmax(vset(-127.0f), x);
  const Vec magic = vset(12582912.0f);
  const Vec whole = vadd(x, magic);
  const Vec r = _mm256_sub_ps(x, _mm256_sub_ps(whole, magic));
@POLYNOMIAL@
  const __m256i shift = _mm256_slli_epi32(_mm256_castps_si256(whole), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), shift));
}""",
    "avx512": """inline Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline bool any_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
inline float vmaximum(Vec a) { return _mm512_reduce_max_ps(a); }
inline Vec viota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Vec vexp2(Vec x) {  // relative error 1e-7
  x = vmax(vset(-150.0f), x);
  const Vec whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec r = _mm512_sub_ps(x, whole);
@POLYNOMIAL@
  return _mm512_scalef_ps(p, whole);
}""",
}
POLYNOMIAL = """  Vec p = vset(1.3268813e-3f);  // 2^r on |r| <= 1/2
  p = vfma(p, r, vset(9.6755413e-3f));
  p = vfma(p, r, vset(5.5507133e-2f));
  p = vfma(p, r, vset(2.4022120e-1f));
  p = vfma(p, r, vset(6.9314697e-1f));
  p = vfma(p, r, vset(1.0f));"""


def isa_text(arch: str) -> str:
    """What the core needs of an instruction set beyond the shared snippets."""
    return ISA_TEXT[arch].replace("@POLYNOMIAL@", POLYNOMIAL)


def tile_text(most: int) -> str:
    """The register tile and its use on any number of rows; `most` rows at once."""
    cases = "\n".join(
        f"      case {n}: tile<{n}, kFresh>(a, lda, b, depth, c, ldc, alpha); break;"
        for n in range(1, most + 1)
    )
    return f"""// c[M, kNR] = a[M, depth] b[depth, kNR] (kFresh) or the same plus alpha * c; b is packed.
template <int M, bool kFresh>
inline __attribute__((always_inline)) void tile(
    const float* __restrict a, int64_t lda, const float* __restrict b, int64_t depth, float* __restrict c,
    int64_t ldc, const float* __restrict alpha) {{
  Vec sum[M][2];
#pragma GCC unroll {most}
  for (int i = 0; i < M; ++i) {{
    if (kFresh) {{
      sum[i][0] = sum[i][1] = vset(0.0f);
    }} else {{
      const Vec scale = vset(alpha[i]);
      sum[i][0] = vmul(scale, vload(c + i * ldc));
      sum[i][1] = vmul(scale, vload(c + i * ldc + kLanes));
    }}
  }}
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {{
    const Vec b0 = vload(b + k * kNR), b1 = vload(b + k * kNR + kLanes);
#pragma GCC unroll {most}
    for (int i = 0; i < M; ++i) {{
      const Vec x = vset(a[i * lda + k]);
      sum[i][0] = vfma(x, b0, sum[i][0]);
      sum[i][1] = vfma(x, b1, sum[i][1]);
    }}
  }}
#pragma GCC unroll {most}
  for (int i = 0; i < M; ++i) {{
    vstore(c + i * ldc, sum[i][0]);
    vstore(c + i * ldc + kLanes, sum[i][1]);
  }}
}}

template <bool kFresh>
inline __attribute__((always_inline)) void tiles(
    int64_t rows, const float* a, int64_t lda, const float* b, int64_t depth, float* c, int64_t ldc,
    const float* alpha) {{
  while (rows > 0) {{
    // The last two share what is left: a tile of few rows waits for its own sums.
    const int64_t n = rows >= {2 * most} ? {most} : rows > {most} ? (rows + 1) / 2 : rows;
    switch (n) {{
{cases}
    }}
    rows -= n;
    a += n * lda;
    c += n * ldc;
    if (!kFresh) alpha += n;
  }}
}}"""


SOFTMAX = f"""// A row of scores becomes probabilities relative to its running maximum m; l sums them by lane.
inline float soften(float* s, int64_t lo, int64_t hi, float& m, float* l) {{
  Vec a = vset({EMPTY}), b = a;
  for (int64_t j = lo; j < hi; j += kNR) {{
    a = vmax(a, vload(s + j));
    b = vmax(b, vload(s + j + kLanes));
  }}
  a = vmax(a, b);
  float rescale = 1.0f;
  if (any_above(a, vset(m + kSlack))) {{
    const float top = vmaximum(a);
    rescale = m == {EMPTY} ? 0.0f : std::exp2(m - top);
    m = top;
  }}
  const Vec minus = vset(m == {EMPTY} ? 0.0f : -m);  // of a row without keys yet, every score becomes 0
  Vec sum0 = vmul(vload(l), vset(rescale)), sum1 = vset(0.0f);
  for (int64_t j = lo; j < hi; j += kNR) {{
    const Vec p0 = vexp2(vadd(vload(s + j), minus)), p1 = vexp2(vadd(vload(s + j + kLanes), minus));
    sum0 = vadd(sum0, p0);
    sum1 = vadd(sum1, p1);
    vstore(s + j, p0);
    vstore(s + j + kLanes, p1);
  }}
  vstore(l, vadd(sum0, sum1));
  return rescale;
}}"""

ROWS = """// to = scale * from, n elements; the rest of a vector is not touched.
inline void widen(const T* from, int64_t n, float* to, float scale) {
  const Vec factor = vset(scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vstore(to + i, vmul(factor, vload(from + i)));
  if (i < n) vstore_first(to + i, vmul(factor, vload_first(from + i, n - i)), n - i);
}
inline void narrow(const float* from, int64_t n, T* to, float scale) {
  const Vec factor = vset(scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vstore(to + i, vmul(factor, vload(from + i)));
  if (i < n) vstore_first(to + i, vmul(factor, vload_first(from + i, n - i)), n - i);
}"""


def pack_keys_text(direct: bool) -> str:
    """Packing the keys of one piece; `direct` when storage is float and rows need no widening."""
    rows = (
        "    for (int64_t i = 0; i < 8; ++i) row[i] = j + i < n ? at(k, first + j + i) : zero;"
        if direct
        else """    for (int64_t i = 0; i < 8; ++i) {
      row[i] = wide + i * D;
      if (j + i < n) {
        widen(at(k, first + j + i), D, wide + i * D, 1.0f);
      } else {
        std::memset(wide + i * D, 0, D * sizeof(float));
      }
    }"""
    )
    scratch = "  static const float zero[D] = {};" if direct else "  float wide[8 * D];"
    return f"""// Keys first .. first + n - 1 of one head in panels, with zeros up to full ones.
inline void pack_keys(const Heads& k, int64_t first, int64_t n, float* kp) {{
{scratch}
  const float* row[8];
  for (int64_t j = 0; j < round_up(n); j += 8) {{
{rows}
    float* panel = kp + j / kNR * kNR * D + j % kNR;
    for (int64_t d = 0; d < D; d += 8) transpose8<kNR>(row, d, panel + d * kNR);
  }}
}}"""


def pack_text(direct: bool, value: int, lanes: int) -> str:
    """Packing the keys and values of one piece."""
    kept = "j < n" if value % (2 * lanes) == 0 else "j < n && e < E"
    load = "vload(from + e)"
    if value % lanes:
        load = f"e + kLanes <= E ? {load} : vload_first(from + e, E - e)"
    return f"""{pack_keys_text(direct)}
// The same of values beside them.
inline void pack_piece(const Heads& k, const Heads& v, int64_t first, int64_t n, float* kp, float* vp) {{
  pack_keys(k, first, n, kp);
  const int64_t padded = round_up(n);
  for (int64_t j = 0; j < padded; ++j) {{
    const T* from = at(v, first + (j < n ? j : 0));
    for (int64_t e = 0; e < kEP; e += kLanes)
      vstore(vp + e / kNR * kNR * padded + j * kNR + e % kNR, {kept} ? {load} : vset(0.0f));
  }}
}}"""


_INTERVALS = {
    Kind.BAND: """    case {p}: {{
      const int64_t u = (i + r.shift) / r.unit;
      return {{(u - r.before) * r.unit, (u + r.after + 1) * r.unit, r.sink}};
    }}""",
    Kind.CAUSAL: """    case {p}: {{
      const int64_t u = (i + r.shift) / r.unit, end = (u + r.after + 1) * r.unit;
      return {{(u - r.before) * r.unit, end, r.sink < end ? r.sink : end}};
    }}""",
    Kind.PAD_SELF: """    case {p}: {{
      if (i + r.shift < limit) return {{0, limit, 0}};
      return {{limit, INT64_MAX / 2, 0}};
    }}""",
}
_ELEMENTS = {
    Kind.SLOT: "    case {p}: return j % rules[{p} - 1].unit < rules[{p} - 1].before;",
    Kind.USER: "    case {p}: return mask[i * mask_row + j * mask_column] != 0;",
}


def rules_text(kinds: list[Kind]) -> str:
    """The predicates that are present: intervals of keys per query, and tests of single pairs."""
    spans = "\n".join(_INTERVALS[k].format(p=p) for p, k in enumerate(kinds, 1) if k in _INTERVALS)
    tests = "\n".join(_ELEMENTS[k].format(p=p) for p, k in enumerate(kinds, 1) if k in _ELEMENTS)
    text = """struct Rule {
  int64_t before, after, unit, sink, shift;
};
// Keys [lo, hi) and [0, sink): each bound rises with the query.
struct Span {
  int64_t lo, hi, sink;
};"""
    if spans:
        text += f"""

inline Span span_of(const Rule* rules, int flag, int64_t i, int64_t limit) {{
  const Rule& r = rules[flag - 1];
  switch (flag) {{
{spans}
    default: return {{0, INT64_MAX / 2, 0}};
  }}
}}"""
    if tests:
        odd = "".join(f"\n    case {p}:" for p, k in enumerate(kinds, 1) if k in _ELEMENTS)
        text += f"""

inline bool by_element(int flag) {{
  switch (flag) {{{odd} return true;
    default: return false;
  }}
}}
inline bool keeps(const Rule* rules, int flag, const uint8_t* mask, int64_t mask_row, int64_t mask_column,
                  int64_t i, int64_t j) {{
  switch (flag) {{
{tests}
    default: return true;
  }}
}}"""
    return text


MASK_SPAN = f"""// Scores of keys outside [lo, hi) and [0, sink) become empty; from .. to are whole panels.
inline void mask_span(float* s, int64_t from, int64_t to, int64_t lo, int64_t hi, int64_t sink) {{
  const Vec low = vset(static_cast<float>(-lo)), high = vset(static_cast<float>(hi - 1));
  const Vec first = vset(static_cast<float>(sink - 1)), minus = vset(-1.0f);
  Vec j = vadd(viota(), vset(static_cast<float>(from)));
  for (int64_t at = from; at < to; at += kLanes) {{
    const Vec inside = vmin(vadd(j, low), vfma(j, minus, high));
    const Vec kept = vmax(inside, vfma(j, minus, first));
    vstore(s + at, vselect_negative(kept, vset({EMPTY}), vload(s + at)));
    j = vadd(j, vset(static_cast<float>(kLanes)));
  }}
}}"""

CHECKS = """// Every row of a table rises from 0 and ends at `most` or below.
inline bool rises(const Table& t, int64_t groups, int64_t width, int64_t most) {
  for (int64_t g = 0; g < (t.step == 0 ? 1 : groups); ++g) {
    const int32_t* row = t.row(g);
    for (int64_t i = 0; i < width; ++i)
      if (row[i] < (i == 0 ? 0 : row[i - 1])) return false;
    if (row[0] != 0 || row[width - 1] > most) return false;
  }
  return true;
}
inline bool all_below(const int32_t* data, int64_t n, int64_t most) {
  for (int64_t i = 0; i < n; ++i)
    if (data[i] < 0 || data[i] >= most) return false;
  return true;
}"""

DENSE_TABLES = """  // One block of all keys; the rows are cut into tasks.
  const int64_t G = 1, nQ = 1, nK = 1;
  const int32_t q_ends[2] = {0, static_cast<int32_t>(S)}, k_ends[2] = {0, static_cast<int32_t>(N)};
  const int32_t entries[2] = {0, 1}, zero[1] = {0};
  const Table q_off_t{q_ends, 0}, k_off_t{k_ends, 0}, row_ptr_t{entries, 0}, col_t{zero, 0};"""
