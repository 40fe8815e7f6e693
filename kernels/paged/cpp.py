"""C++ for paged_attention and token_attention: tasks over heads, rows and key ranges, merged at the end."""

from __future__ import annotations

from tilewright.kernels.common.cpp import ELEMENT, LANES, cpp_file, dtype_constant, require, vector_text
from tilewright.kernels.common.family import config_of
from tilewright.kernels.paged.cpp_core import CHUNK, MOST_ROWS, core_text, walk_text
from tilewright.kernels.paged.cpp_rows import constants_text, pages_text, row_format
from tilewright.kernels.paged.signature import attention_names, attention_schema, entries_of, is_packed
from tilewright.runtime.contracts import KernelKey

SERIAL_BYTES = 1 << 17
"""Keys and values of a call below which waking a second thread costs more than it saves."""


def head_text(key: KernelKey) -> str:
    """Types and constants of a configuration."""
    config = config_of(key)
    return f"""using T = {ELEMENT[key.dtype]};
using Place = int64_t;
constexpr int64_t D = {config["head"]}, E = {config["value"]}, P = {config["page"]};{constants_text(key)}
constexpr int64_t kChunk = {CHUNK}, kRows = {MOST_ROWS}, kNR = {2 * LANES[key.target.arch]};
constexpr float kSlack = 8;"""


TASK = """struct Task {
  int64_t b, g, first, rows;  // rows first .. first + rows - 1 of the group
  int64_t entry, end;
  int64_t part;  // where among the parts its sums, maxima and totals go; -1 when it has all keys
};

struct Result {
  T* out;
  float* lse;
  int64_t H, G, tokens;
  int64_t row(int64_t b, int64_t g, int64_t r) const { return (b * H + g * G + r % G) * tokens + r / G; }
};

// A row of sums with their maximum m (base 2) and total l becomes a row of the result.
inline void finish(const Result& to, int64_t row, const float* sums, float m, float total) {
  const bool none = total == 0.0f;
  const Vec factor = vset(none ? 0.0f : 1.0f / total);
  for (int64_t e = 0; e < E; e += kLanes) vstore(to.out + row * E + e, vmul(factor, vload(sums + e)));
  to.lse[row] = none ? -std::numeric_limits<float>::infinity() : (m + std::log2(total)) * 0.69314718f;
}

void attend(const Task& t, Walk walk, const T* q, const int64_t* q_step, float scale, const Place& base,
            const Result& to, float* parts) {
  Scratch w;
  const int64_t G = to.G;
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t row = t.first + r;
    const T* from = q + t.b * q_step[0] + (t.g * G + row % G) * q_step[1] + row / G * q_step[2];
    for (int64_t d = 0; d < D; d += kLanes) vstore(w.q + r * D + d, vmul(vset(scale), vload(from + d)));
    w.m[r] = -1e30f;
  }
  std::memset(w.out, 0, t.rows * E * sizeof(float));
  std::memset(w.l, 0, t.rows * kLanes * sizeof(float));
  Keys chunks[2];
  walk.fill(chunks[0]);
  for (int now = 0; chunks[now].n > 0; now = 1 - now) {
    walk.fill(chunks[1 - now]);
    attend_chunk(w, t.first, t.rows, G, base, chunks[now], chunks[1 - now]);
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    const float total = vsum(vload(w.l + r * kLanes));
    if (t.part < 0) {
      finish(to, to.row(t.b, t.g, t.first + r), w.out + r * E, w.m[r], total);
    } else {
      float* part = parts + (t.part + r) * (E + 2);
      std::memcpy(part, w.out + r * E, E * sizeof(float));
      part[E] = w.m[r];
      part[E + 1] = total;
    }
  }
}

// Merges the parts of the rows of tasks[first] .. tasks[end - 1] into the first, then into the result.
inline void merge(const std::vector<Task>& tasks, size_t first, size_t end, const Result& to, float* parts) {
  const Task& t = tasks[first];
  for (int64_t r = 0; r < t.rows; ++r) {
    float* sums = parts + (t.part + r) * (E + 2);
    for (size_t i = first + 1; i < end; ++i) {
      const float* more = parts + (tasks[i].part + r) * (E + 2);
      const float top = sums[E] > more[E] ? sums[E] : more[E];
      const float a = std::exp2(sums[E] - top), b = std::exp2(more[E] - top);
      for (int64_t e = 0; e < E; e += kLanes)
        vstore(sums + e, vfma(vset(b), vload(more + e), vmul(vset(a), vload(sums + e))));
      sums[E] = top;
      sums[E + 1] = a * sums[E + 1] + b * more[E + 1];
    }
    finish(to, to.row(t.b, t.g, t.first + r), sums, sums[E], sums[E + 1]);
  }
}

// All tasks that have parts.
inline void merge_all(const std::vector<Task>& tasks, const Result& to, float* parts) {
  for (size_t i = 0; i < tasks.size();) {
    size_t end = i + 1;
    while (end < tasks.size() && tasks[end].b == tasks[i].b && tasks[end].g == tasks[i].g &&
           tasks[end].first == tasks[i].first)
      ++end;
    if (tasks[i].part >= 0) merge(tasks, i, end, to, parts);
    i = end;
  }
}"""

_BELOW = """inline bool all_below(const int32_t* x, int64_t count, int64_t end) {  // -1 stands for none
  bool good = true;
  for (int64_t i = 0; i < count; ++i) good = good && x[i] >= -1 && x[i] < end;
  return good;
}"""

_RUN = """  const int64_t G = H / Hkv, rows = tokens * G, blocks = (rows + kRows - 1) / kRows;
  const int64_t out_sizes[4] = {B, H, tokens, E};
  Tensor out(out_sizes, 4, @DTYPE@), lse(out_sizes, 3, aoti_torch_dtype_float32());
  const Result to{out.mutable_data<T>(), lse.mutable_data<float>(), H, G, tokens};
  const auto clip = [](int64_t x, int64_t most) -> int64_t { return x < 0 ? 0 : x > most ? most : x; };
  const auto low = [&](int64_t b) -> int64_t { return clip(@FIRST@, n * P); };
  const auto high = [&](int64_t b, int64_t row) -> int64_t {  // end of what rows up to `row` see
    return clip(lengths_p[b] - tokens + row / G + 1, n * P);
  };
  const auto begin_of = [&](int64_t b) -> int64_t { return @BEGIN@; };
  const auto end_of = [&](int64_t b, int64_t row) -> int64_t { return @END@; };

  int64_t work = 0;  // entries times blocks of rows
  for (int64_t b = 0; b < B; ++b)
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t last = (i + 1) * kRows < rows ? (i + 1) * kRows : rows;
      const int64_t span = end_of(b, last - 1) - begin_of(b);
      work += span > 0 ? span * Hkv : 0;
    }
  constexpr int64_t kKeys = @KEYS@;  // of an entry
  int64_t threads = thread_count();
  if (work * kKeys * (D + E) * static_cast<int64_t>(sizeof(T)) < kSerialBytes) threads = 1;
  int64_t piece = INT64_MAX;
  if (threads > 1 && B * Hkv * blocks < threads * 8) {
    piece = work / (threads * 8) + 1;
    if (piece * kKeys < 8 * kChunk) piece = 8 * kChunk / kKeys;  // nothing prefetches a part's first chunk
  }

  std::vector<Task> tasks;
  int64_t parts = 0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t g = 0; g < Hkv; ++g)
      for (int64_t i = blocks - 1; i >= 0; --i) {  // later rows first: they take longer
        const int64_t first = i * kRows, some = rows - first < kRows ? rows - first : kRows;
        const int64_t begin = begin_of(b), end = end_of(b, first + some - 1);
        if (piece >= end - begin) {
          tasks.push_back({b, g, first, some, begin, end, -1});
          continue;
        }
        const int64_t cuts = (end - begin + piece - 1) / piece;
        for (int64_t c = 0; c < cuts; ++c, parts += some)
          tasks.push_back({b, g, first, some, begin + (end - begin) * c / cuts,
                           begin + (end - begin) * (c + 1) / cuts, parts});
      }
  std::vector<float> sums(parts * (E + 2));

  std::atomic<size_t> next_task{0};
  const int64_t *ks = k_pages.strides(), *vs = v_pages.strides();
  const float factor = static_cast<float>(scale * 1.4426950408889634);
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    for (size_t i; (i = next_task++) < tasks.size();) {
      const Task& t = tasks[i];
      Walk walk{{k_pages.data<@ROW@>() + t.g * ks[1], ks[0], ks[2]},
                {v_pages.data<@ROW@>() + t.g * vs[1], vs[0], vs[2]},
                page_table.data<int32_t>() + t.b * n@LIST@, low(t.b), high(t.b, t.first + t.rows - 1),
                t.entry, t.end};
      attend(t, walk, q.data<T>(), q.strides(), factor, lengths_p[t.b] - tokens, to,
             sums.data());
    }
  });
  merge_all(tasks, to, sums.data());
  stack[0] = out.release();
  stack[1] = lse.release();"""


def pool_checks(key: KernelKey, rows: str) -> list[str]:
    """What keeps a wrong pool from being read: `rows` is the tensor with as many heads or groups of them."""
    dtype, d, e = dtype_constant(key.dtype), "D", "E"
    if is_packed(key):
        dtype, d, e = dtype_constant("uint8"), "kKeyBytes", "kValueBytes"
    return [
        require(
            f"k_pages.is_cpu({dtype}) && v_pages.is_cpu({dtype}) && k_pages.dim() == 4 && v_pages.dim() == 4",
            f"k_pages and v_pages must be [N, Hkv, P, {d}] and [N, Hkv, P, {e}] of one dtype",
        ),
        "  const int64_t N = k_pages.sizes()[0], Hkv = k_pages.sizes()[1];",
        require(
            "v_pages.sizes()[0] == N && v_pages.sizes()[1] == Hkv && k_pages.sizes()[2] == P && "
            f"v_pages.sizes()[2] == P && k_pages.sizes()[3] == {d} && v_pages.sizes()[3] == {e}",
            f"k_pages and v_pages must be [N, Hkv, P, {d}] and [N, Hkv, P, {e}]",
        ),
        require(
            "k_pages.strides()[3] == 1 && v_pages.strides()[3] == 1",
            "the last axis of k_pages and v_pages must be contiguous",
        ),
        f"  const int64_t B = {rows}.sizes()[0];",
    ]


def index_checks(name: str, dtype: str, axes: int) -> list[str]:
    """An index tensor of B rows, made contiguous."""
    constant = dtype_constant(dtype)
    return [
        require(
            f"{name}.is_cpu({constant}) && {name}.dim() == {axes} && {name}.sizes()[0] == B",
            f"{name} must be {dtype} with {axes} axes, B first",
        ),
        f"  {name}.make_contiguous({constant});",
    ]


def _arguments(key: KernelKey) -> list[str]:
    dtype, names = dtype_constant(key.dtype), attention_names(key)
    lines = [f"  Tensor {name}(stack[{i}]);" for i, name in enumerate(names)]
    lines += [f"  const double scale = to_double(stack[{len(names)}]);"]
    lines += [require(f"q.is_cpu({dtype}) && q.dim() == 4", "q must be [B, H, T, D] in the pool's dtype")]
    lines += pool_checks(key, "q")
    lines += [
        "  const int64_t H = q.sizes()[1], tokens = q.sizes()[2];",
        require(
            "q.sizes()[3] == D && Hkv > 0 && H % Hkv == 0", "q must be [B, H, T, D] with H a multiple of Hkv"
        ),
        f"  if (q.strides()[3] != 1) q.make_contiguous({dtype});",
        *index_checks("page_table", "int32", 2),
        "  const int64_t n = page_table.sizes()[1];",
        require(
            "all_below(page_table.data<int32_t>(), B * n, N)", "page_table names a page that is not there"
        ),
        *index_checks("lengths", "int64", 1),
        "  const int64_t* lengths_p = lengths.data<int64_t>();",
    ]
    if "first" in names:
        lines += [*index_checks("first", "int64", 1), "  const int64_t* first_p = first.data<int64_t>();"]
    for name, most in (("picked", "n"), ("positions", "n * P")):
        if name in names:
            lines += [
                *index_checks(name, "int32", 3),
                f"  const int64_t lists = {name}.sizes()[1], listed = {name}.sizes()[2];",
                require("lists == 1 || lists == Hkv", f"{name} must have 1 or Hkv heads"),
                require(
                    f"all_below({name}.data<int32_t>(), B * lists * listed, {most})",
                    f"an entry of {name} is outside what page_table holds",
                ),
            ]
    return lines


def generate(key: KernelKey, op: str) -> str:
    """The source for one configuration."""
    entries, names, rows = entries_of(key), attention_names(key), row_format(key)
    run = rows.fill(_RUN).replace("@DTYPE@", dtype_constant(key.dtype))
    run = run.replace("@FIRST@", "first_p[b]" if "first" in names else "0")
    run = run.replace("@BEGIN@", "low(b) / P" if entries == "all" else "0")
    run = run.replace("@END@", "(high(b, row) + P - 1) / P" if entries == "all" else "listed")
    run = run.replace("@KEYS@", "1" if entries == "tokens" else "P")
    name = {"picked": "picked", "tokens": "positions"}.get(entries, "")
    table = f", {name}.data<int32_t>() + (t.b * lists + (lists > 1 ? t.g : 0)) * listed" if name else ""
    body = [
        head_text(key) + f"\nconstexpr int64_t kSerialBytes = {SERIAL_BYTES};",
        walk_text(entries, rows),
        core_text(key.target.arch, rows=rows),
        TASK,
        _BELOW,
        "\n".join(
            [
                "void run(StableIValue* stack, uint64_t, uint64_t) {",
                *_arguments(key),
                run.replace("@LIST@", table),
                "}",
            ]
        ),
    ]
    what = {
        "all": "a paged pool",
        "picked": "picked pages of a pool",
        "tokens": "single tokens of a paged pool",
    }
    return cpp_file(
        title=f"Attention over {what[entries]}, {key.dtype}, {pages_text(key)}.",
        note="Softmax and sums run in float32.",
        target=str(key.target),
        vector=vector_text(key.target.arch, {"sum", "max", "select", key.dtype}),
        body="\n\n".join(body),
        op=op,
        schema=attention_schema(key),
        includes=("atomic", "cmath", "limits", "vector"),
    )
