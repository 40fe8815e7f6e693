"""C++ of the work of one call: which panels are packed, which rows attend, and the threads that do both.

Panels and what threads compute with live in memory that the library keeps from call to call: fresh pages cost
a fault and a zeroing each, as much as packing into them. A call needs the size of k and v in float32, widened
to whole panels, and at most 0.6 MiB a thread. A head is packed just before its rows are worked on, while
other threads still are at the head before, so that a cache holds its panels; blocks that no row attends are
not packed.
"""

from __future__ import annotations

from typing import Any

from tilewright.kernels.block_sparse_attention.signature import RULE_FIELDS, kinds_of, options_of
from tilewright.runtime.contracts import KernelKey

KEPT_MIB = 64
"""Most that a library keeps between calls; a call that needs more returns all of it."""

LEASE = f"""// Memory of a call, kept for the next one when it is not too large.
// Calls at the same time have their own; that of the last to end stays.
class Lease {{
 public:
  explicit Lease(int64_t floats) : block_(kept_.exchange(nullptr)) {{
    const size_t bytes = sizeof(Block) + floats * sizeof(float);
    if (block_ != nullptr && block_->bytes >= bytes) return;
    std::free(block_);
    const size_t page = bytes < kHugePage ? sizeof(Block) : kHugePage;
    const size_t whole = (bytes + page - 1) / page * page;
    block_ = static_cast<Block*>(std::aligned_alloc(page, whole));
    if (block_ == nullptr) throw std::bad_alloc();
    if (page == kHugePage) madvise(block_, whole, MADV_HUGEPAGE);  // fewer faults and fewer misses of the TLB
    block_->bytes = whole;
  }}
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  ~Lease() {{ std::free(block_->bytes > kKept ? block_ : kept_.exchange(block_)); }}

  float* data() {{ return reinterpret_cast<float*>(block_ + 1); }}

 private:
  struct alignas(64) Block {{
    size_t bytes;
  }};
  static constexpr size_t kHugePage = size_t{{2}} << 20, kKept = size_t{{{KEPT_MIB}}} << 20;
  inline static std::atomic<Block*> kept_{{nullptr}};
  Block* block_;
}};"""

STRUCTS = """// What all tasks of a call share. Index tables have a row per group, or one for all (step 0).
struct Table {
  const int32_t* data;
  int64_t step;
  const int32_t* row(int64_t group) const { return data + group * step; }
};
struct Unit {  // packed keys and values of one head under one cutting into blocks
  Heads k, v;
  const int32_t* k_off;
  const int64_t* start;  // packed keys before each block
  float *kp, *vp;
  size_t pieces;  // of this unit and those before
};
struct Piece {  // n keys from slot `first`, packed at `place`
  int64_t unit, first, n, place;
};
struct Task {
  int64_t b, h, group, unit, block, first, rows;
};"""

_UNITS = """  // Units: heads of k and v under each cutting that a query head asks for.
  std::vector<int64_t> starts, totals;
  for (int64_t g = 0; g < (@CUTS@ ? G : 1); ++g) {
    int64_t sum = 0;
    for (int64_t block = 0; block < nK; ++block) {
      starts.push_back(sum);
      sum += round_up(k_off_t.row(g)[block + 1] - k_off_t.row(g)[block]);
    }
    totals.push_back(sum);
  }
  std::vector<Unit> units;
  std::vector<int64_t> unit_of(B * H), offset;
  int64_t packed = 0;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      const int64_t share = H / Hkv, cut = @CUTS@ ? group_of(b, h) : 0;
      int64_t like = h / share * share;
      while (like < h && @CUTS@ && group_of(b, like) != cut) ++like;
      if (like < h) {
        unit_of[b * H + h] = unit_of[b * H + like];
        continue;
      }
      unit_of[b * H + h] = static_cast<int64_t>(units.size());
      offset.push_back(packed);
      packed += totals[cut];
      units.push_back({head(k, b, h / share@SRC_K@), head(v, b, h / share@SRC_K@), k_off_t.row(cut),
                       starts.data() + cut * nK, nullptr, nullptr, 0});
    }
  }
  const int64_t threads = thread_count();
  Lease lease(packed * (D + kEP) + threads * Scratch::kFloats);
  float* const scratch = lease.data() + packed * (D + kEP);
  for (size_t i = 0; i < units.size(); ++i) {
    units[i].kp = lease.data() + offset[i] * D;
    units[i].vp = lease.data() + packed * D + offset[i] * kEP;
  }"""

_READ = """  std::vector<char> read(units.size() * nK);  // blocks that a row of a unit attends
  for (int64_t head = 0; head < B * H; ++head) {
    const int64_t g = group_of(head / H, head % H);
    char* blocks = read.data() + unit_of[head] * nK;
    for (int64_t e = 0; e < row_ptr_t.row(g)[nQ]; ++e) blocks[col_t.row(g)[e]] = 1;
  }
"""

_PIECES = """  std::vector<Piece> pieces;
  std::vector<std::atomic<int64_t>> unpacked(units.size());  // pieces of a unit
  for (size_t i = 0; i < units.size(); ++i) {
    const size_t before = pieces.size();
    for (int64_t block = 0; block < nK; ++block) {@SKIP@
      const int64_t first = units[i].k_off[block], end = units[i].k_off[block + 1];
      for (int64_t j = first; j < end; j += kKeys)
        pieces.push_back({static_cast<int64_t>(i), j, end - j < kKeys ? end - j : kKeys,
                          units[i].start[block] + j - first});
    }
    unpacked[i] = static_cast<int64_t>(pieces.size() - before);
    units[i].pieces = pieces.size();
  }"""

_TASKS = """  std::vector<Task> tasks;  // by unit; later rows first: under a causal rule they take longer
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      const int64_t g = group_of(b, h), unit = unit_of[b * H + h];
      for (int64_t block = nQ - 1; block >= 0; --block) {
        const int64_t begin = q_off_t.row(g)[block], end = q_off_t.row(g)[block + 1]@Q_VALID@;
        const int64_t cuts = (end - begin + kQRows - 1) / kQRows;
        for (int64_t i = cuts - 1; i >= 0; --i) {
          const int64_t rows = end - begin, first = begin + rows * i / cuts;
          const int64_t last = begin + rows * (i + 1) / cuts;
          tasks.push_back({b, h, g, unit, block, first, last - first});
        }
      }
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& x, const Task& y) { return x.unit < y.unit; });"""

_WORK = """  // A thread packs what is left to pack up to the unit of its next task, then attends.
  std::atomic<size_t> next_piece{0}, next_task{0};
  T* result = out.mutable_data<T>();
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    const Scratch w(scratch + begin * Scratch::kFloats);
    for (size_t i; (i = next_task++) < tasks.size();) {
      const Task& t = tasks[i];
      const Unit& u = units[t.unit];
      for (size_t p; next_piece < u.pieces && (p = next_piece++) < pieces.size();) {
        const Unit& other = units[pieces[p].unit];
        pack_piece(other.k, other.v, pieces[p].first, pieces[p].n, other.kp + pieces[p].place * D,
                   other.vp + pieces[p].place * kEP);
        --unpacked[pieces[p].unit];
      }
      while (unpacked[t.unit] > 0) std::this_thread::yield();  // another thread has the last of them
      attend(t, call, head(q, t.b, t.h@HEADS@), u, w, @VALID@,
             result + @PLACE@, @LSE@@MORE@);
    }
  });"""


def _calls(key: KernelKey) -> list[str]:
    """The struct that tasks share."""
    config, kinds = options_of(key), kinds_of(key)
    values = ["static_cast<float>(scale)", "row_ptr_t", "col_t"]
    lines = []
    if config["flag"]:
        values.append("flag_t")
    if kinds:
        rows = (
            ["{INT64_MAX / 4, 0, 1, 0, 0}"]
            if config["layout"] == "causal"
            else [
                f"{{{', '.join(f'{field}{p}' for field in RULE_FIELDS)}}}" for p in range(1, len(kinds) + 1)
            ]
        )
        lines.append(f"  const Rule rules[] = {{{', '.join(rows)}}};")
        values.append("rules")
    if config["mask"]:
        lines.append("  const int64_t *ms = mask.sizes(), *mt = mask.strides();")
        values += ["ms[2] == 1 ? 0 : mt[2]", "ms[3] == 1 ? 0 : mt[3]"]
    return [*lines, f"  const Call call{{{', '.join(values)}}};"]


def _work(key: KernelKey) -> str:
    config, kinds = options_of(key), kinds_of(key)
    blocks = config["layout"] == "blocks"
    more = ""
    if config["src_q"]:
        more += ", src_q_t.row(t.group)"
    if not blocks:
        more += ", step"
    if kinds:
        limit = "limit.data<int32_t>()[t.b]" if config["limit"] else "0"
        mask = (
            "mask.data<uint8_t>() + (ms[0] == 1 ? 0 : t.b * mt[0]) + (ms[1] == 1 ? 0 : t.h * mt[1])"
            if config["mask"]
            else "nullptr"
        )
        more += f", {limit}, {mask}"
    texts = {
        "HEADS": ", src_q_t.row(t.group)" if config["src_q"] else ", nullptr" if config["src_k"] else "",
        "VALID": "k_valid.data<int32_t>()[t.b]" if config["k_valid"] else "INT64_MAX / 2",
        "PLACE": "(t.b * H + t.h) * S * E" if blocks else "t.b * S * H * E + t.h * head_step",
        "LSE": "lse.mutable_data<float>() + (t.b * H + t.h) * S" if blocks else "nullptr",
        "MORE": more,
    }
    return _filled(_WORK, texts)


def _filled(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def jobs_text(key: KernelKey) -> list[str]:
    """From checked arguments to the finished output, as statements of `run`."""
    config: dict[str, Any] = options_of(key)
    blocks = config["layout"] == "blocks"
    src = bool(config["src_q"] or config["src_k"])
    # With its own index map but a shared cutting, a group still needs its own unit and table row.
    cuts = "(k_off_t.step != 0" + (" || src_k_t.step != 0)" if config["src_k"] else ")")
    source = ", src_k_t.row(cut)" if config["src_k"] else ", nullptr" if src else ""
    tasks = _TASKS.replace("@Q_VALID@", "")
    if config["q_valid"]:
        valid = "clip(q_valid.data<int32_t>()[b] - begin, ends - begin)"
        tasks = tasks.replace(
            "end = q_off_t.row(g)[block + 1];", f"ends = q_off_t.row(g)[block + 1], end = begin + {valid};"
        )
    skip = "\n      if (!read[i * nK + block]) continue;" if blocks else ""
    return [
        _filled(_UNITS, {"CUTS": cuts if blocks else "false", "SRC_K": source}),
        (_READ if blocks else "") + _PIECES.replace("@SKIP@", skip),
        tasks,
        *_calls(key),
        _work(key),
    ]
