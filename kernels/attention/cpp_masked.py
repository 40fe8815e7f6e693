"""C++ of attention under a mask, up to some hundred queries: keys that it hides from all are not read.

A static cache has room for more keys than it holds, and the mask hides the rest. So each row of the mask is
looked at first (a byte or a float a key, where the key itself is hundreds): the first and the last key that
it lets through bound what is read, by sequence and head. In between the mask is applied. Micro-kernels,
softmax and the sharing out among threads are those of attention over pages.

A row of an additive mask may hold nothing but -inf and the lowest number (of a padded query): softmax then
gives its keys equal weight, and so does this. Such a row is read whole, and so is one of numbers far below 0.
"""

from __future__ import annotations

from tilewright.kernels.common.cpp import ELEMENT, LANES, cpp_file, dtype_constant, require, vector_text
from tilewright.kernels.common.family import config_of
from tilewright.kernels.paged.cpp import SERIAL_BYTES, TASK
from tilewright.kernels.paged.cpp_core import CHUNK, MOST_ROWS, Cut, core_text, walk_text
from tilewright.runtime.contracts import KernelKey

LOWEST = {
    "bool": 0.0,
    "float32": -3.4028234663852886e38,
    "bfloat16": -3.3895313892515355e38,
    "float16": -65504.0,
}
"""By type of the mask, the number that stands for minus infinity."""

_SEEN = """// What a row of the mask lets through: keys lo .. hi - 1 and nothing outside. A flat row has
// nothing but numbers far below 0, where rounding matters: its scores count relative to `top`, its
// greatest element. A bool mask has no flat rows.
struct Seen {
  int64_t lo, hi;
  float top;
  bool flat;
};"""

_LOOK = """// The first n elements of a row as what is added to the scores; n <= kChunk.
inline void widen(const M* p, int64_t n, float* to) {
@WIDEN@
}

inline Seen look(const M* row, int64_t count) {
  float x[kChunk];
  Seen s{count, 0, -std::numeric_limits<float>::infinity(), false};
  const auto bound = [&](float limit) {  // the first and the last above the limit
    int64_t last = -1;
    for (int64_t at = 0; at < count; at += kChunk) {
      const int64_t n = count - at < kChunk ? count - at : kChunk;
      widen(row + at, n, x);
      for (int64_t j = n; j < kChunk; ++j) x[j] = -std::numeric_limits<float>::infinity();
      Vec most = vload(x);
      for (int64_t j = kLanes; j < kChunk; j += kLanes) most = vmax(most, vload(x + j));
      if (!any_above(most, vset(limit))) continue;
      const float top = vmaximum(most);
      s.top = top > s.top ? top : s.top;
      for (int64_t j = 0; j < n && last < 0; ++j)
        if (x[j] > limit) s.lo = at + j, last = at;
      last = at;
    }
    if (last < 0) return;
    const int64_t n = count - last < kChunk ? count - last : kChunk;
    widen(row + last, n, x);
    for (s.hi = last + n; !(x[s.hi - last - 1] > limit);) --s.hi;
  };
  bound(kLowest);
  s.flat = !(s.top > kFlat);
  if (s.flat) {
    bound(-std::numeric_limits<float>::infinity());
    s.flat = s.lo < s.hi;
  }
  return s;
}"""

_LOOK_BOOL = """// The first n elements of a row as what is added to the scores; n <= kChunk.
inline void widen(const M* p, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = p[i] ? 0.0f : -std::numeric_limits<float>::infinity();
}

inline Seen look(const M* row, int64_t count) {
  const void* first = std::memchr(row, 1, count);
  if (first == nullptr) return {count, 0, 0.0f, false};
  int64_t lo = static_cast<const M*>(first) - row, hi = count;
  for (uint64_t eight; hi - lo >= 8; hi -= 8) {
    std::memcpy(&eight, row + hi - 8, 8);
    if (eight != 0) break;
  }
  while (!row[hi - 1]) --hi;
  return {lo, hi, 0.0f, false};
}"""

_WIDEN = """  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vstore(to + i, vload(p + i));
  if (i < n) vstore(to + i, vload_first(p + i, n - i));"""

_PLACE = """// The mask as query heads g * G .. of sequence b see it; steps in elements, of Seen in entries.
struct Place {
  const M* mask;
  const Seen* seen;
  int64_t head, query, seen_head, seen_query, G;
  const M* row(int64_t r) const { return mask + r % G * head + r / G * query; }
  const Seen& of(int64_t r) const { return seen[r % G * seen_head + r / G * seen_query]; }
};

// Elements of a row of the mask in the order of a chunk's keys; 0 past them.
inline void gather(const M* row, const Keys& c, float* to) {
  float x[kChunk];
  const int64_t start = c.last + 1 - c.n;
  widen(row + start, c.n, x);
  for (int64_t j = 0; j < c.n; ++j) to[j] = x[c.at[j] - start];
  for (int64_t j = c.n; j < kChunk; ++j) to[j] = 0.0f;
}

// Adds a row of the mask to a row of scores, which are in units of log2.
inline void add_mask(float* s, const float* mask, const Seen& seen, const Keys& c) {
  constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;
  if (!seen.flat) {
    for (int64_t j = 0; j < kChunk; j += kLanes)
      vstore(s + j, vfma(vload(mask + j), vset(kLog2E), vload(s + j)));
    return;
  }
  for (int64_t j = 0; j < c.n; ++j) {
    const float sum = s[j] * kLn2 + mask[j];  // rounded, as softmax finds it
    s[j] = (sum - seen.top) * kLog2E;
  }
}"""

_BEFORE = """  alignas(64) float added[kChunk];
  const M* shown = nullptr;"""
_ROW = """    if (const M* row = base.row(first + r); row != shown) gather(shown = row, c, added);
    add_mask(s, added, base.of(first + r), c);"""

_RUN = """  const int64_t G = H / Hkv, rows = queries * G, blocks = (rows + kRows - 1) / kRows;
  const int64_t out_sizes[4] = {B, H, queries, E};
  Tensor out(out_sizes, 4, @DTYPE@);
  std::vector<float> lse(B * H * queries);
  const Result to{out.mutable_data<T>(), lse.data(), H, G, queries};

  int64_t sizes[3], step[3], seen_step[3];  // of sequences, heads and queries in the mask
  for (int64_t axis = 0; axis < 3; ++axis) {
    const int64_t at = axis - (4 - mask.dim()), wanted = axis == 0 ? B : axis == 1 ? H : queries;
    sizes[axis] = at < 0 ? 1 : mask.sizes()[at];
    require(sizes[axis] == 1 || sizes[axis] == wanted, "mask must broadcast to [B, H, S, T]");
    step[axis] = sizes[axis] == 1 ? 0 : mask.strides()[at];
    if (step[axis] == 0) sizes[axis] = 1;
  }
  for (int64_t axis = 2, count = 1; axis >= 0; count *= sizes[axis--])
    seen_step[axis] = sizes[axis] == 1 ? 0 : count;
  const M* mask_p = mask.data<M>();
  std::vector<Seen> seen;
  seen.reserve(sizes[0] * sizes[1] * sizes[2]);
  for (int64_t b = 0; b < sizes[0]; ++b)
    for (int64_t h = 0; h < sizes[1]; ++h)
      for (int64_t s = 0; s < sizes[2]; ++s)
        seen.push_back(look(mask_p + b * step[0] + h * step[1] + s * step[2], keys));
  const auto place = [&](int64_t b, int64_t g) {
    return Place{mask_p + b * step[0] + g * G * step[1],
                 seen.data() + b * seen_step[0] + g * G * seen_step[1],
                 step[1], step[2], seen_step[1], seen_step[2], G};
  };

  std::vector<Task> whole;
  int64_t work = 0;  // keys times blocks of rows
  for (int64_t b = 0; b < B; ++b)
    for (int64_t g = 0; g < Hkv; ++g)
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t first = i * kRows, some = rows - first < kRows ? rows - first : kRows;
        const Place here = place(b, g);
        int64_t lo = keys, hi = 0;
        for (int64_t r = first; r < first + some; ++r) {
          const Seen& row = here.of(r);
          lo = row.lo < lo ? row.lo : lo;
          hi = row.hi > hi ? row.hi : hi;
        }
        if (hi < lo) hi = lo;
        work += hi - lo;
        whole.push_back({b, g, first, some, lo, hi, -1});
      }
  int64_t threads = thread_count();
  if (work * (D + E) * static_cast<int64_t>(sizeof(T)) < kSerialBytes) threads = 1;
  int64_t piece = INT64_MAX;
  if (threads > 1 && B * Hkv * blocks < threads * 8) {
    piece = work / (threads * 8) + 1;
    if (piece < 8 * kChunk) piece = 8 * kChunk;  // nothing prefetches a part's first chunk
  }
  std::vector<Task> tasks;
  int64_t parts = 0;
  for (const Task& t : whole) {
    const int64_t count = t.end - t.entry, cuts = count > piece ? (count - 1) / piece + 1 : 1;
    for (int64_t c = 0; c < cuts; ++c) {
      tasks.push_back({t.b, t.g, t.first, t.rows, t.entry + count * c / cuts,
                       t.entry + count * (c + 1) / cuts, cuts > 1 ? parts : -1});
      if (cuts > 1) parts += t.rows;
    }
  }
  std::vector<float> sums(parts * (E + 2));

  std::atomic<size_t> next_task{0};
  const int64_t *ks = k.strides(), *vs = v.strides();
  const float factor = static_cast<float>(scale * 1.4426950408889634);
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    for (size_t i; (i = next_task++) < tasks.size();) {
      const Task& t = tasks[i];
      Walk walk{{k.data<T>() + t.b * ks[0] + t.g * ks[1], 0, ks[2]},
                {v.data<T>() + t.b * vs[0] + t.g * vs[1], 0, vs[2]},
                t.entry, t.end};
      attend(t, walk, q.data<T>(), q.strides(), factor, place(t.b, t.g), to, sums.data());
    }
  });
  merge_all(tasks, to, sums.data());
  stack[0] = out.release();"""


def schema() -> str:
    """The kernel op's arguments and result."""
    return "(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor"


def _arguments(key: KernelKey, element: str) -> list[str]:
    dtype, mask = dtype_constant(key.dtype), dtype_constant(element)
    whole = " && ".join(f"{x}.is_cpu({dtype}) && {x}.dim() == 4" for x in "qkv")
    return [
        *(f"  Tensor {name}(stack[{i}]);" for i, name in enumerate(("q", "k", "v", "mask"))),
        "  const double scale = to_double(stack[4]);",
        require(whole, "q, k and v must have 4 axes and one dtype"),
        "  const int64_t B = q.sizes()[0], H = q.sizes()[1], queries = q.sizes()[2];",
        "  const int64_t Hkv = k.sizes()[1], keys = k.sizes()[2];",
        require(
            "k.sizes()[0] == B && v.sizes()[0] == B && v.sizes()[1] == Hkv && v.sizes()[2] == keys && "
            "q.sizes()[3] == D && k.sizes()[3] == D && v.sizes()[3] == E && Hkv > 0 && H % Hkv == 0",
            "q, k and v must be [B, H, S, D], [B, Hkv, T, D] and [B, Hkv, T, E] with H a multiple of Hkv",
        ),
        require("k.strides()[3] == 1 && v.strides()[3] == 1", "the last axis of k and v must be contiguous"),
        f"  if (q.strides()[3] != 1) q.make_contiguous({dtype});",
        require(
            f"mask.is_cpu({mask}) && mask.dim() >= 1 && mask.dim() <= 4 && "
            "mask.sizes()[mask.dim() - 1] == keys",
            f"mask must be {element} and broadcast to [B, H, S, T]",
        ),
        f"  if (keys > 1 && mask.strides()[mask.dim() - 1] != 1) mask.make_contiguous({mask});",
    ]


def _head(key: KernelKey, element: str) -> str:
    config, lowest = config_of(key), LOWEST[element]
    ctype = {"bool": "uint8_t"}.get(element) or ELEMENT[element]
    return f"""using T = {ELEMENT[key.dtype]};
using M = {ctype};  // of the mask
constexpr int64_t D = {config["head"]}, E = {config["value"]};
constexpr int64_t kChunk = {CHUNK}, kRows = {MOST_ROWS}, kNR = {2 * LANES[key.target.arch]};
constexpr int64_t kSerialBytes = {SERIAL_BYTES};
constexpr float kSlack = 8, kLowest = {lowest!r}f, kFlat = -1024;"""


def generate(key: KernelKey, op: str) -> str:
    """The source for one configuration."""
    element = config_of(key)["mask"]
    arguments = "\n".join(_arguments(key, element))
    run = _RUN.replace("@DTYPE@", dtype_constant(key.dtype))
    look = _LOOK_BOOL if element == "bool" else _LOOK.replace("@WIDEN@", _WIDEN)
    cut = Cut("The mask is `base`.", _BEFORE, _ROW, f"{_SEEN}\n\n{look}\n\n{_PLACE}")
    return cpp_file(
        title=f"Attention under a {element} mask, {key.dtype}: hidden keys are not read.",
        note="Softmax and sums run in float32.",
        target=str(key.target),
        vector=vector_text(
            key.target.arch, {"sum", "max", "select", "partial", key.dtype, element} - {"bool"}
        ),
        body="\n\n".join(
            (
                _head(key, element),
                walk_text("rows"),
                core_text(key.target.arch, cut),
                TASK,
                f"void run(StableIValue* stack, uint64_t, uint64_t) {{\n{arguments}\n{run}\n}}",
            )
        ),
        op=op,
        schema=schema(),
        includes=("atomic", "cmath", "limits", "vector"),
    )
