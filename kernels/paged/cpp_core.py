"""C++ of attention over rows that pointers name: micro-kernels, chunks of keys, the walk over a sequence.

The recipe. Keys are taken kChunk at a time as lists of row pointers, so that pages of any size, picked pages
and single tokens run the same code and nothing is copied. Each row of K and V is read once for all G query
heads of its group (and all new tokens): products with a register tile of query rows x 4 keys, whose sums
across lanes are shared by the 4; then the softmax of block-sparse attention (exp2, a running maximum that
moves only when a score exceeds it by more than kSlack); then rows of V into a register tile of query rows x 4
vectors. While one chunk is worked on, the rows of the next are prefetched: a hardware prefetcher cannot
follow a page table.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.kernels.block_sparse_attention.cpp_core import SOFTMAX, isa_text

CHUNK = 64
MOST_ROWS = 48
"""Query rows of a task: their scores for a chunk and their sums stay in L1 and L2."""
TILE_ROWS = {"avx2": 3, "avx512": 6}
"""Rows of a register tile: with 4 keys its sums, a row and a key fill 16 (32) registers."""

_SUM4 = {
    "avx2": """// The sums across lanes of four vectors.
inline __m128 vsum4(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = vadd(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const Vec cd = vadd(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const Vec all = vadd(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}""",
    "avx512": """// The sums across lanes of four vectors.
inline __m128 vsum4(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = vadd(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = vadd(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Vec all = vadd(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}""",
}

_PRODUCTS = """// s[i][j] = a[i] . b[j] for M rows and 4 keys; `ahead`: rows to prefetch, nullptr for none.
template <int M>
inline __attribute__((always_inline)) void products(
    const float* __restrict a, const @ROW@* const* b, float* __restrict s, const @ROW@* const* ahead) {
  if (ahead != nullptr) {
    for (int j = 0; j < 4; ++j) @AHEAD_KEY@;
  }
  Vec sum[M][4];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = vset(0.0f);
#pragma GCC unroll 2
  for (int64_t d = 0; d < D; d += kLanes) {
    Vec x[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) x[i] = vload(a + i * D + d);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec y = @KEY@;
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) sum[i][j] = vfma(x[i], y, sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
    _mm_storeu_ps(s + i * kChunk, vsum4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
}"""

_ACCUMULATE = """// out[i] = alpha[i] out[i] + the sum over n keys of p[i][j] v[j]; M rows, W vectors from e.
template <int M, int W>
inline __attribute__((always_inline)) void accumulate(
    const float* __restrict p, int64_t n, const @ROW@* const* v, int64_t e, float* __restrict out,
    const float* __restrict alpha, const @ROW@* const* ahead) {
  Vec sum[M][W];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sum[i][w] = vmul(vset(alpha[i]), vload(out + i * E + e + w * kLanes));
  for (int64_t j = 0; j < n; ++j) {
    if (ahead != nullptr) @AHEAD_VALUE@;
    Vec x[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) x[i] = vset(p[i * kChunk + j]);
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      const Vec y = @VALUE@;
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) sum[i][w] = vfma(x[i], y, sum[i][w]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) vstore(out + i * E + e + w * kLanes, sum[i][w]);
}

template <int M>
inline void accumulate_row(const float* p, int64_t n, const @ROW@* const* v, float* out, const float* alpha,
                           const @ROW@* const* ahead) {
  constexpr int64_t whole = E / (4 * kLanes) * 4 * kLanes, rest = (E - whole) / kLanes;
  for (int64_t e = 0; e < whole; e += 4 * kLanes) accumulate<M, 4>(p, n, v, e, out, alpha, ahead);
  if constexpr (rest > 0) accumulate<M, rest>(p, n, v, whole, out, alpha, ahead);
}"""

_STEP = """struct Scratch {
  alignas(64) float q[kRows * D], out[kRows * E], scores[kRows * kChunk], l[kRows * kLanes];
  float m[kRows], alpha[kRows];
};

// One chunk for the rows first .. first + rows - 1 of a group (row = new token * G + head). @PLACE@
inline void attend_chunk(Scratch& w, int64_t first, int64_t rows, int64_t G, const Place& base, const Keys& c,
                         const Keys& next) {
  const int64_t padded = (c.n + kNR - 1) / kNR * kNR;
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r, some = @SOME@;
    float* s = w.scores + r * kChunk;
    for (int64_t j = 0; j < c.n; j += 4) {
      const @ROW@* const* ahead = r == 0 && next.n > 0 ? next.k + j : nullptr;
      switch (some) {
@PRODUCTS@
      }
    }
    r += some;
  }
@BEFORE@
  for (int64_t r = 0; r < rows; ++r) {
    float* s = w.scores + r * kChunk;
    for (int64_t j = c.n; j < padded; ++j) s[j] = -1e30f;
@CUT@
    w.alpha[r] = soften(s, 0, padded, w.m[r], w.l + r * kLanes);
  }
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r, some = @SOME@;
    const @ROW@* const* ahead = r == 0 && next.n > 0 ? next.v : nullptr;
    switch (some) {
@ACCUMULATE@
    }
    r += some;
  }
}"""


@dataclass(frozen=True)
class Cut:
    """What shuts keys out of a chunk, as C++ that knows a `Place base`."""

    place: str
    """What `base` is, for a comment."""
    before: str
    """Once for a chunk."""
    row: str
    """For scores s of row r."""
    helpers: str = ""
    """What the two call."""


NEW_TOKENS = Cut(
    "New token t\n// stands at position `base` + t.",
    "  const bool cut = c.last > base + first / G;",
    """    if (cut) {
      const int64_t place = base + (first + r) / G;
      for (int64_t j = 0; j < c.n; ++j)
        if (c.at[j] > place) s[j] = -1e30f;
    }""",
)


@dataclass(frozen=True)
class RowFormat:
    """How a row of keys or values is read, as C++."""

    element: str = "T"
    key: str = "vload(b[j] + d)"
    """Channels d .. d + kLanes - 1 of the row b[j]."""
    value: str = "vload(v[j] + e + w * kLanes)"
    ahead_key: str = "prefetch<D>(ahead[j])"
    ahead_value: str = "prefetch<W * kLanes>(ahead[j] + e)"
    """Once for every W vectors of a row."""
    helpers: str = ""
    """What these call."""

    def fill(self, text: str) -> str:
        """The text with this format's words."""
        words = {"@ROW@": self.element, "@KEY@": self.key, "@VALUE@": self.value}
        words |= {"@AHEAD_KEY@": self.ahead_key, "@AHEAD_VALUE@": self.ahead_value}
        for name, word in words.items():
            text = text.replace(name, word)
        return text


PLAIN_ROWS = RowFormat()


_PREFETCH = """template <int64_t kCount>
inline void prefetch(const @ROW@* row) {
  for (int64_t i = 0; i < kCount; i += 64 / sizeof(@ROW@))
    _mm_prefetch(reinterpret_cast<const char*>(row + i), _MM_HINT_T0);
}"""


def sum4_text(arch: str) -> str:
    """`vsum4`: the sums across lanes of four vectors at once."""
    return _SUM4[arch]


def core_text(arch: str, cut: Cut = NEW_TOKENS, rows: RowFormat = PLAIN_ROWS) -> str:
    """The core for an instruction set; it needs T, D, E, kChunk, kRows, kNR, kSlack, the type Place, vector
    snippets and the struct Keys of `walk_text`."""
    most = TILE_ROWS[arch]
    some = "left == 4 ? 2 : left < 3 ? left : 3" if most == 3 else f"left < {most} ? left : {most}"
    products = "\n".join(
        f"        case {m}: products<{m}>(w.q + r * D, c.k + j, s + j, ahead); break;"
        for m in range(1, most + 1)
    )
    accumulate = "\n".join(
        f"      case {m}: accumulate_row<{m}>(w.scores + r * kChunk, c.n, c.v, w.out + r * E, w.alpha + r, "
        "ahead); break;"
        for m in range(1, most + 1)
    )
    step = _STEP.replace("@PLACE@", cut.place).replace("@BEFORE@", cut.before).replace("@CUT@", cut.row)
    step = step.replace("@SOME@", some).replace("@PRODUCTS@", products).replace("@ACCUMULATE@", accumulate)
    own = [rows.helpers] if rows.helpers else []
    helpers = [cut.helpers] if cut.helpers else []
    micro = [isa_text(arch), SOFTMAX, _SUM4[arch], _PREFETCH, *own, _PRODUCTS, _ACCUMULATE]
    return rows.fill("\n\n".join([*micro, *helpers, step]))


_KEYS = """// Keys that a sequence holds, at most kChunk of them; rows past n are repeats of the last one.
struct Keys {
  int64_t n, last;  // last: the greatest position
  const @ROW@ *k[kChunk], *v[kChunk];
  int64_t at[kChunk];  // positions
};

// A full chunk in another order, as if from four places at once: one hardware prefetcher stream a place
// (25 % off a decode step whose keys are in memory).
inline void spread(Keys& c) {
  const Keys old = c;
  for (int64_t i = 0; i < kChunk; ++i) {
    const int64_t from = i % 4 * (kChunk / 4) + i / 4;
    c.k[i] = old.k[from];
    c.v[i] = old.v[from];
    c.at[i] = old.at[from];
  }
}

// The rows of one key head in a pool, by page and slot.
struct Rows {
  const @ROW@* data;
  int64_t page, slot;  // steps in elements
};"""

_FILL = """  // The next keys with lo <= position < hi; none when the walk is over.
  void fill(Keys& c) {
    c.n = 0;
    c.last = -1;
@LOOP@
    if (c.n == kChunk) spread(c);
    for (int64_t j = c.n; j < kChunk; ++j) {
      c.k[j] = c.n > 0 ? c.k[c.n - 1] : nullptr;
      c.v[j] = c.n > 0 ? c.v[c.n - 1] : nullptr;
    }
  }"""

_PAGES = """    while (entry < end && c.n < kChunk) {
      const int64_t place = @PLACE@, id = place < 0 ? -1 : table[place];
      const int64_t start = place * P, from = lo - start > slot ? lo - start : slot;
      const int64_t stop = hi - start < P ? hi - start : P;
      if (id < 0 || from >= stop) {
        ++entry;
        slot = 0;
        continue;
      }
      const int64_t room = kChunk - c.n, some = stop - from < room ? stop - from : room;
      const @ROW@ *kr = k.data + id * k.page + from * k.slot, *vr = v.data + id * v.page + from * v.slot;
      for (int64_t i = 0; i < some; ++i) {
        c.k[c.n + i] = kr + i * k.slot;
        c.v[c.n + i] = vr + i * v.slot;
        c.at[c.n + i] = start + from + i;
      }
      c.n += some;
      if (start + from + some - 1 > c.last) c.last = start + from + some - 1;
      slot = from + some;
      if (slot >= stop) {
        ++entry;
        slot = 0;
      }
    }"""

_TOKENS = """    for (; entry < end && c.n < kChunk; ++entry) {
      const int64_t at = list[entry];
      if (at < lo || at >= hi || table[at / P] < 0) continue;
      const int64_t id = table[at / P], slot = at % P;
      c.k[c.n] = k.data + id * k.page + slot * k.slot;
      c.v[c.n] = v.data + id * v.page + slot * v.slot;
      c.at[c.n++] = at;
      if (at > c.last) c.last = at;
    }"""


_ROWS = """    for (; entry < end && c.n < kChunk; ++entry) {
      c.k[c.n] = k.data + entry * k.slot;
      c.v[c.n] = v.data + entry * v.slot;
      c.at[c.n++] = c.last = entry;
    }"""


def walk_text(entries: str, rows: RowFormat = PLAIN_ROWS) -> str:
    """The structs Keys, Rows and Walk; entries: all, picked, tokens, or rows (of a plain cache)."""
    return rows.fill(_walk_text(entries))


def _walk_text(entries: str) -> str:
    if entries == "rows":
        return f"""{_KEYS}

// Rows entry .. end - 1 of what one sequence and key head attends to.
struct Walk {{
  Rows k, v;
  int64_t entry, end;

{_FILL.replace("@LOOP@", _ROWS).replace(" with lo <= position < hi", "")}
}};"""
    loop = (
        _TOKENS
        if entries == "tokens"
        else _PAGES.replace("@PLACE@", "entry" if entries == "all" else "list[entry]")
    )
    members = "  const int32_t* list;\n" if entries != "all" else ""
    slot = "  int64_t slot = 0;\n" if entries != "tokens" else ""
    return f"""{_KEYS}

// Entries entry .. end - 1 of what one sequence and key head attends to.
struct Walk {{
  Rows k, v;
  const int32_t* table;
{members}  int64_t lo, hi, entry, end;
{slot}
{_FILL.replace("@LOOP@", loop)}
}};"""
