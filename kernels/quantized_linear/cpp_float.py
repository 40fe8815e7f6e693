"""C++ for quantized_linear and quantized_linear_multi with weights of small floats (fp8, NVFP4).

Rows of the weight lie one after the other. Codes of fp8 are shifted to where the bits of a float16 lie (the
processor converts those, subnormals too), which leaves a power of two; the 16 codes of NVFP4 are looked up.
Few rows of x meet the codes as they are decoded, several weight rows at a time so that a thread reads
several streams; one row of x meets rows far apart. More rows of x share a decoded panel of 16 weight rows
that stays in cache. What differs on AVX-512 is in cpp_float_wide.py.
"""

from __future__ import annotations

from tilewright.compiler.float_format import E2M1, FloatFormat
from tilewright.compiler.weight_format import CHUNK
from tilewright.kernels.common.cpp import ELEMENT, TRANSPOSE8, cpp_file, vector_text
from tilewright.kernels.common.family import config_of
from tilewright.kernels.quantized_linear import cpp, cpp_float_wide, cpp_wide
from tilewright.kernels.quantized_linear.cpp_panel import FLOAT_TILE, FLOAT_TILE_TEXT
from tilewright.kernels.quantized_linear.cpp_parts import AHEAD_BYTES, range_text
from tilewright.runtime.contracts import KernelKey

FEW = 8
"""So many rows of x at most meet codes as they are decoded."""
ROW_FLOATS = 8
"""Floats that a row of x whose activations are rounded takes beside its columns."""

_E4M3 = """// The bit below the sign is cleared: of a sign-extended code it is a copy of it.
inline Int halves(__m128i c) {
  return _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(c), 7), _mm256_set1_epi16(-16385));
}
constexpr float kUnit = 256.0f;  // what a decoded number is to be multiplied by"""

_E5M2 = """inline Int halves(__m128i c) { return _mm256_slli_epi16(_mm256_cvtepu8_epi16(c), 8); }
constexpr float kUnit = 1.0f;"""

_FP8 = """// 32 columns of a row; `fine` is of NVFP4.
inline void decode(const uint8_t* p, const uint8_t*, Vec (&w)[4]) {
  for (int i = 0; i < 2; ++i) {
    const Int h = halves(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
    w[2 * i] = _mm256_cvtph_ps(_mm256_castsi256_si128(h));
    w[2 * i + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1));
  }
}"""

_NVFP4 = """constexpr float kUnit = 0.5f;  // the table holds doubled values
inline float e4m3(uint8_t c) {
  const Vec v = _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>((c & 128) << 8 | (c & 127) << 7)));
  return _mm256_cvtss_f32(v) * 256.0f;
}
struct Table {
  float of[256];
  Table() {
    for (int c = 0; c < 256; ++c) of[c] = e4m3(static_cast<uint8_t>(c));
  }
};
const Table kScales;

inline Vec widened(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }

// 32 columns of a row times their scales: the even ones, then the odd ones, as `settle` lays x out.
inline void decode(const uint8_t* p, const uint8_t* fine, Vec (&w)[4]) {
  const __m128i table = _mm_setr_epi8(TABLE);
  const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(15);
  const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(c, low));
  const __m128i odd = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(c, 4), low));
  const Vec first = vset(kScales.of[fine[0]]), second = vset(kScales.of[fine[1]]);
  w[0] = vmul(widened(even), first);
  w[1] = vmul(widened(_mm_unpackhi_epi64(even, even)), second);
  w[2] = vmul(widened(odd), first);
  w[3] = vmul(widened(_mm_unpackhi_epi64(odd, odd)), second);
}"""

_EVEN_ODD = """// Columns of every chunk: the even ones, then the odd ones.
inline void settle(float* x) {
  float was[32];
  std::memcpy(was, x, sizeof was);
  for (int k = 0; k < 16; ++k) {
    x[k] = was[2 * k];
    x[16 + k] = was[2 * k + 1];
  }
}
inline void prepare(const Row& row, int64_t K32) {
  for (int64_t c = 0; c < K32; ++c) settle(row.x + c * 32);
}"""

_AS_IT_IS = "inline void prepare(const Row&, int64_t) {}"

_CUT = """// To nearest, ties to even, of 3 bits behind the leading one or of 2^-9 at least: adding 1.5 * 2^20
// of a number's power of two leaves no room for more. Saturates at 448.
inline Vec e4m3_value(Vec a) {
  a = _mm256_min_ps(vmax(vset(-448.0f), a), vset(448.0f));
  Vec power = _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7F800000)));
  const Vec magic = vmul(vmax(vset(0.015625f), power), vset(1572864.0f));
  return _mm256_sub_ps(vadd(a, magic), magic);
}

inline void prepare(const Row& row, int64_t K32) {
  float inverse;
  *row.scale = range(row.x, K32, &inverse);
  for (int64_t k = 0; k < K32 * 32; k += 8)
    vstore(row.x + k, e4m3_value(vmul(vload(row.x + k), vset(inverse))));
}"""

_DOT = """// R weight rows times M rows of x: lane[m][r].
template <int R, int M>
inline void dot(const uint8_t* const* start, const Row* rows, int64_t K32, float (*lane)[8]) {
  const uint8_t* p[R];
  Vec sum[R][M];
  for (int r = 0; r < R; ++r) {
    p[r] = start[r];
    for (int m = 0; m < M; ++m) sum[r][m] = vset(0.0f);
  }
  for (int64_t g = 0, c = 0; c < K32; ++g) {
    Vec part[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) part[r][m] = vset(0.0f);
    for (const int64_t last = c + chunks_of(c, K32); c < last; ++c)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        _mm_prefetch(reinterpret_cast<const char*>(p[r]) + kAhead, _MM_HINT_T0);
        Vec w[4];
        decode(p[r], start[r] + fine_at(K32) + 2 * c, w);
        for (int i = 0; i < 4; ++i)
          for (int m = 0; m < M; ++m) part[r][m] = vfma(w[i], vload(rows[m].x + c * 32 + i * 8), part[r][m]);
        p[r] += kChunkBytes;
      }
    for (int r = 0; r < R; ++r) {
      const Vec scale = vset(scale_of(start[r], K32, g));
      for (int m = 0; m < M; ++m) sum[r][m] = vfma(part[r][m], scale, sum[r][m]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) lane[m][r] = vsum(sum[r][m]) * (kUnitTOKEN);
}"""

_BLOCKS = """// 8 weight rows times M rows of x; rows behind the last are read as the last, and not stored.
template <int M>
inline void block_times(const Weight& w, int64_t block, const Row* rows, int64_t first, int64_t K32) {
  constexpr int kSide = M == 1 ? 4 : 2;
  float lane[M][8], some[M][8];
  for (int r = 0; r < 8; r += kSide) {
    const uint8_t* start[kSide];
    for (int i = 0; i < kSide; ++i) start[i] = row_of(w, block * 8 + r + i, K32);
    dot<kSide, M>(start, rows, K32, some);
    for (int m = 0; m < M; ++m) std::memcpy(lane[m] + r, some[m], kSide * sizeof(float));
  }
  for (int m = 0; m < M; ++m) store(w, first + m, block, vload(lane[m]));
}"""

_STREAMS = """// Blocks of S ranges far apart, row by row.
template <int S>
inline void blocks_of_streams(const Place* at, const Row& row, int64_t m, int64_t K32) {
  if (S == 1) return block_times<1>(*at->weight, at->block, &row, m, K32);
  float lane[S][8], some[1][8];
  for (int r = 0; r < 8; ++r) {
    const uint8_t* start[S];
    for (int s = 0; s < S; ++s) start[s] = row_of(*at[s].weight, at[s].block * 8 + r, K32);
    dot<S, 1>(start, &row, K32, some);
    for (int s = 0; s < S; ++s) lane[s][r] = some[0][s];
  }
  for (int s = 0; s < S; ++s) store(*at[s].weight, m, at[s].block, vload(lane[s]));
}"""

_PANEL = """using Weights = float;
// A panel of 16 rows: [columns][16] decoded.
inline int64_t panel_size(int64_t K32) { return K32 * 32 * 16; }

inline void unpack_block(const Weight& w, int64_t block, int64_t K32, float* to) {
  alignas(32) float wide[8][32];
  const uint8_t* start[8];
  const float* rows[8];
  for (int r = 0; r < 8; ++r) {
    start[r] = row_of(w, block * 8 + r, K32);
    rows[r] = wide[r];
  }
  for (int64_t g = 0, c = 0; c < K32; ++g) {
    float scale[8];
    for (int r = 0; r < 8; ++r) scale[r] = scale_of(start[r], K32, g) * kUnit;
    for (const int64_t last = c + chunks_of(c, K32); c < last; ++c, to += 32 * 16) {
      for (int r = 0; r < 8; ++r) {
        Vec v[4];
        decode(start[r] + c * kChunkBytes, start[r] + fine_at(K32) + 2 * c, v);
        for (int i = 0; i < 4; ++i) vstore(wide[r] + i * 8, vmul(v[i], vset(scale[r])));
      }
      for (int k = 0; k < 32; k += 8) transpose8<16>(rows, k, to + k * 16);
    }
  }
}"""

_MULTIPLY = """// M rows of x times two blocks of 8 rows of a weight.
inline void multiply_panel(const Weight& w, int64_t block, Weights* panel, const Row* rows, int64_t first,
                           int64_t M, int64_t K32) {
  const bool both = block + 1 < w.blocks;
  if (M <= FEW) {
    for (int64_t b = block; b < block + 1 + both; ++b) {
      int64_t m = 0;
      for (; m + 4 <= M; m += 4) block_times<4>(w, b, rows + m, first + m, K32);
      if (m + 2 <= M) {
        block_times<2>(w, b, rows + m, first + m, K32);
        m += 2;
      }
      if (m < M) block_times<1>(w, b, rows + m, first + m, K32);
    }
    return;
  }
  unpack_block(w, block, K32, panel);
  if (both) unpack_block(w, block + 1, K32, panel + 8);
STEPS
}"""

_STEPS = """  int64_t m = 0;
  for (; m + kTile <= M; m += kTile) rows_of_panel<kTile>(w, block, panel, rows + m, first + m, K32);
  for (; m < M; ++m) rows_of_panel<1>(w, block, panel, rows + m, first + m, K32);"""


def _geometry(element: str, group: int) -> str:
    """Where the codes and scales of a weight row lie: compiler/float_format.py has the layout."""
    chunks = group // CHUNK if element != "nvfp4" else 0
    count = "(K32 + kGroup - 1) / kGroup" if chunks else "1"
    many = "(K32 - first < kGroup ? K32 - first : kGroup)" if chunks else "K32"
    fine = " + 2 * K32" if element == "nvfp4" else ""
    return f"""constexpr int64_t kGroup = {chunks};  // chunks of 32 columns with a float32 scale; 0: a row
constexpr int64_t kChunkBytes = {16 if element == "nvfp4" else 32};

inline int64_t groups_of(int64_t K32) {{ return {count}; }}
inline int64_t chunks_of(int64_t first, int64_t K32) {{ return {many}; }}
inline int64_t fine_at(int64_t K32) {{ return K32 * kChunkBytes + 4 * groups_of(K32); }}
inline int64_t packed_width(int64_t K32) {{ return (fine_at(K32){fine} + 3) / 4 * 4; }}
inline int64_t packed_rows(int64_t rows) {{ return rows; }}
inline int64_t block_bytes(int64_t K32) {{ return 8 * packed_width(K32); }}
inline float scale_of(const uint8_t* row, int64_t K32, int64_t g) {{
  float scale;
  std::memcpy(&scale, row + K32 * kChunkBytes + 4 * g, 4);
  return scale;
}}"""


def _decode(element: str) -> str:
    if element != "nvfp4":
        return f"using Int = __m256i;\n\n{_E4M3 if element == 'e4m3' else _E5M2}\n\n{_FP8}"
    doubled = [int(2 * v) for v in E2M1]
    return _NVFP4.replace("TABLE", ", ".join(str(v) for v in (*doubled, *[-v for v in doubled])))


def _scratch(cut: bool, wide: bool) -> str:
    """Memory for rows of x, and how they get there."""
    at = "\n    rows[m].scale = rows[m].x + K32 * 32;" if cut else ""
    columns = "span(K32)" if wide else "K32 * 32"
    return f"""// Memory for every row of x, kept by the calling thread from call to call.
inline Row* scratch(int64_t M, int64_t K32) {{
  thread_local std::vector<float> memory;
  thread_local std::vector<Row> rows;
  const int64_t each = ({columns} + {ROW_FLOATS if cut else 0} + 15) / 16 * 16;
  if (static_cast<int64_t>(memory.size()) < M * each + 15) memory.resize(M * each + 15);
  float* first = memory.data() + -(reinterpret_cast<uintptr_t>(memory.data()) / 4) % 16;  // on a cache line
  if (static_cast<int64_t>(rows.size()) < M) rows.resize(M);
  for (int64_t m = 0; m < M; ++m) {{
    rows[m].x = first + m * each;{at}
  }}
  return rows.data();
}}

{cpp.WIDEN_ROW}"""


def row_floats(form: FloatFormat, chunks: int) -> int:
    """Floats that a prepared row of x of so many chunks takes at most."""
    return -(-chunks // 4) * 128 if form.is_nvfp4 else chunks * 32 + ROW_FLOATS


def arithmetic(form: FloatFormat, wide: bool) -> str:
    """Where a weight of a format lies, Row (a row of x), `prepare`, and `dot`, their products.

    wide: of 16 lanes, for AVX-512; those of NVFP4 need TRANSPOSE8.
    """
    element, cut = form.name.removeprefix("fp8-"), form.activation != "none"
    settled = cpp_float_wide.SETTLE if wide else _EVEN_ODD
    prepare = f"{range_text(448)}\n{_CUT}" if cut else settled if form.is_nvfp4 else _AS_IT_IS
    scale = "\n  float* scale;" if cut else ""
    row = f"""struct Row {{
  float* x;  // the columns, as `prepare` lays them out{scale}
}};"""
    token = " * *rows[m].scale" if cut else ""
    if wide:
        decode, dot = cpp_float_wide.decode(form), cpp_float_wide.dot(form, token)
    else:
        decode, dot = _decode(element), _DOT.replace("TOKEN", token)
    return "\n\n".join((_geometry(element, form.group), decode, row, prepare, dot))


_ROW_OF = """inline const uint8_t* row_of(const Weight& w, int64_t row, int64_t K32) {
  return w.data + (row < w.rows ? row : w.rows - 1) * packed_width(K32);
}"""


def generate(key: KernelKey, op: str, form: FloatFormat) -> str:
    """The source file for one configuration: `form`, number of weights, which have biases, dtype of x."""
    config, wide = config_of(key), key.target.arch == "avx512"
    cut = form.activation != "none"
    head = f"""using T = {ELEMENT[key.dtype]};
constexpr int kCount = {config["count"]};  // weights
constexpr int64_t kAhead = {cpp_float_wide.AHEAD_BYTES if wide else AHEAD_BYTES};  // bytes"""
    panel_scale = ("vmul(", ", vset(*rows[i].scale))") if cut else ("", "")
    if wide:
        panel, tile = cpp_float_wide.PANEL, cpp_wide.TILE_TEXT.replace("COLUMNS", "span(K32)")
        many, steps = [cpp.TILES], "  tiles<kTile>(w, block, panel, rows, first, M, K32);"
    else:
        panel, tile = _PANEL, FLOAT_TILE_TEXT
        many, steps = [], _STEPS
    body = (
        head,
        TRANSPOSE8,
        arithmetic(form, wide),
        _scratch(cut, wide),
        cpp.store(key),
        _ROW_OF,
        _BLOCKS,
        cpp.walk(_STREAMS),
        f"constexpr int kTile = {cpp_wide.TILE if wide else FLOAT_TILE};",
        panel,
        tile,
        cpp.rows_of_panel(*panel_scale),
        *many,
        _MULTIPLY.replace("FEW", str(cpp_float_wide.FEW if wide else FEW)).replace("STEPS", steps),
        cpp.run(key, prepares=True, few=1),
    )
    scales = "row" if form.group == 0 else f"{form.group} columns"
    activation = "fp8 per row" if cut else "as they are"
    return cpp_file(
        title=f"x W^T, W {form.name}, a scale per {scales}; activations {activation}.",
        note="Sums are float32.",
        target=str(key.target),
        vector=vector_text("avx2", {"sum", "partial", "abs", "max", key.dtype}),
        body="\n\n".join(body),
        op=op,
        schema=cpp.schema(key),
        includes=("atomic", "vector"),
    )
