"""C++ for float32 linear and linear_multi with dozens of rows of x: the drafts of a batch, a short prompt.

Rows times weight rows are sums over columns, so the weight is turned around first: a panel holds two vectors
of weight rows, column by column, and stays in cache while all rows of x go over it, `TILE` of them in
registers. While the first of them do, the weight rows of the next panel are fetched, so that turning them
never waits for memory. Threads take panels from a common counter, one ahead.
"""

from __future__ import annotations

TILE = {"avx2": 6, "avx512": 13}
"""Rows of x in registers, times two vectors: with those and one of x they fill 15 or 29 registers."""
DEPTH = 128
"""Columns of a panel. Longer rows are cut, and so are their sums, which rounds less."""

_PACK = """// Columns [k, k + depth) of kPanel rows of a weight as panel[column][row]; past its end the last
// row stands again.
inline void pack(const Weight& w, int64_t row, int64_t k, int64_t depth, float* panel) {
  for (int64_t r = 0; r < kPanel; r += 8) {
    const float* rows[8];
    for (int i = 0; i < 8; ++i) {
      const int64_t at = row + r + i < w.rows ? row + r + i : w.rows - 1;
      rows[i] = w.data + at * w.stride + k;
    }
    int64_t c = 0;
    for (; c + 8 <= depth; c += 8) transpose8<kPanel>(rows, c, panel + c * kPanel + r);
    for (; c < depth; ++c)
      for (int i = 0; i < 8; ++i) panel[c * kPanel + r + i] = rows[i][c];
  }
}"""

_TILE = """// R rows of x times a panel; the rows of a weight from `next` on are fetched meanwhile.
template <int R>
inline void multiply(const float* panel, const float* x, int64_t K, int64_t depth, const float* next,
                     int64_t stride, Vec (&sum)[R][2]) {
  for (int m = 0; m < R; ++m) sum[m][0] = sum[m][1] = vset(0.0f);
  int64_t k = 0;
  for (int64_t row = 0; row < kPanel; ++row, next += stride)
    for (const float* fetch = next; k < depth * (row + 1) / kPanel; ++k, fetch += kPanel) {
      for (int64_t line = 0; line < kPanel; line += 16)
        _mm_prefetch(reinterpret_cast<const char*>(fetch + line), _MM_HINT_T1);
      const Vec b0 = vload(panel + k * kPanel), b1 = vload(panel + k * kPanel + kLanes);
#pragma GCC unroll @TILE@
      for (int m = 0; m < R; ++m) {
        const Vec a = vset(x[m * K + k]);
        sum[m][0] = vfma(a, b0, sum[m][0]);
        sum[m][1] = vfma(a, b1, sum[m][1]);
      }
    }
}

// Puts n results of row m down, from weight row `row` on; adds them to those of the columns before.
inline void put(const Weight& w, int64_t m, int64_t row, int64_t n, bool first, Vec value) {
  float* out = w.out + m * w.rows + row;
  if (n >= kLanes) {
@WHOLE@
    vstore(out, value);
  } else if (n > 0) {
@PART@
    vstore_first(out, value, n);
  }
}

template <int R>
inline void rows_of_panel(const Weight& w, int64_t row, bool first, const float* panel, const float* x,
                          int64_t m0, int64_t K, int64_t depth, const float* next, int64_t stride) {
  Vec sum[R][2];
  multiply<R>(panel, x, K, depth, next, stride, sum);
  const int64_t n = w.rows - row;
  for (int m = 0; m < R; ++m) {
    put(w, m0 + m, row, n, first, sum[m][0]);
    put(w, m0 + m, row + kLanes, n - kLanes, first, sum[m][1]);
  }
}"""

_WALK = """// Panel `index` of all weights; `weight` is past the last where there are no more.
struct Place {
  const Weight* weight;
  int64_t row;
  Place(const Weight* first, const Weight* last, int64_t index) : weight(first), row(0) {
    for (; weight != last; ++weight) {
      const int64_t panels = (weight->rows + kPanel - 1) / kPanel;
      if (index < panels) break;
      index -= panels;
    }
    row = index * kPanel;
  }
};

// One panel: all rows of x; then the panel at `after` is in L2.
inline void walk(const Place& at, const Place& after, bool more, const float* x, int64_t M, int64_t K,
                 float* panel) {
  const Weight& w = *at.weight;
  for (int64_t k = 0; k < K; k += kDepth) {
    const int64_t depth = K - k < kDepth ? K - k : kDepth;
    pack(w, at.row, k, depth, panel);
    const bool last = k + kDepth >= K;
    const Place& then = last && more ? after : at;
    const int64_t stride = then.weight->stride;
    const float* next = then.weight->data + then.row * stride + (last ? 0 : k + kDepth);
    for (int64_t m = 0, parts = (M + kTile - 1) / kTile; m < M; --parts) {
      const int64_t rows = (M - m + parts - 1) / parts;
      switch (rows) {
@CASES@
      }
      m += rows;
    }
  }
}

// Memory that a thread keeps for its panel.
inline float* panel_memory() {
  thread_local std::vector<float> memory(kDepth * kPanel + 16);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}"""

REGION = """  const Weight* const behind = weights + sizeof(weights) / sizeof(Weight);
  std::atomic<int64_t> taken{0};
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    float* panel = panel_memory();
    Place at(weights, behind, taken++);
    while (at.weight != behind) {
      const Place after(weights, behind, taken++);
      walk(at, after, after.weight != behind, a, M, K, panel);
      at = after;
    }
  });"""


def panel_text(arch: str, *, bias: bool) -> str:
    """pack, multiply and walk: what `REGION` calls. `Weight` and the vectors of `arch` come before."""
    tile = TILE[arch]
    call = "rows_of_panel<{n}>(w, at.row, k == 0, panel, x + m * K + k, m, K, depth, next, stride)"
    cases = "\n".join(f"        case {n}: {call.format(n=n)}; break;" for n in range(1, tile + 1))
    whole = "    if (!first) value = vadd(value, vload(out));"
    part = "    if (!first) value = vadd(value, vload_first(out, n));"
    if bias:
        whole += "\n    if (first && w.bias != nullptr) value = vadd(value, vload(w.bias + row));"
        part += "\n    if (first && w.bias != nullptr) value = vadd(value, vload_first(w.bias + row, n));"
    head = f"""constexpr int kTile = {tile}, kPanel = 2 * kLanes;  // rows of x and of a weight
constexpr int64_t kDepth = {DEPTH};"""
    multiply = _TILE.replace("@TILE@", str(tile)).replace("@WHOLE@", whole).replace("@PART@", part)
    return "\n\n".join((head, _PACK, multiply, _WALK.replace("@CASES@", cases)))
