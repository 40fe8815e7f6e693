"""C++ for rotate_rows: the angles of a position once for all heads, then the rotation of their rows."""

from __future__ import annotations

from tilewright.kernels.common.cpp import ELEMENT, cpp_file, dtype_constant, require, vector_text
from tilewright.kernels.common.family import config_of
from tilewright.kernels.paged.signature import COSINE, SINE, polynomial, rotate_names, rotate_schema
from tilewright.runtime.contracts import KernelKey

_TURN = """// cos and sin of `offset` positions; pace is in right angles.
inline void angles(double offset, const double* pace, float* to_cos, float* to_sin) {
  constexpr double kWhole = 6755399441055744.0;  // 1.5 2^52: adding it rounds to a whole number
  for (int64_t i = 0; i < kPairs; ++i) {
    const double x = offset * pace[i];
    const double n = x + kWhole - kWhole, turns = (n * 0.25 + kWhole - kWhole) * 4;
    const float r = static_cast<float>(x - n), z = r * r;
    const float sine = r * @SINE@;
    const float cosine = 1 + z * @COSINE@;
    const int32_t quadrant = static_cast<int32_t>(n - turns);
    const float c = quadrant & 1 ? sine : cosine, s = quadrant & 1 ? cosine : sine;
    to_cos[i] = (quadrant + 1) & 2 ? -c : c;
    to_sin[i] = quadrant & 2 ? -s : s;
  }
}

inline void rotate(const T* from, const float* c, const float* s, T* to) {
  alignas(64) float x[D], y[D];
  for (int64_t d = 0; d < D; d += kLanes) vstore(x + d, vload(from + d));
  for (int64_t i = 0; i < kPairs; ++i) {
    const int64_t a = @FIRST@, b = @SECOND@;
    y[a] = x[a] * c[i] - x[b] * s[i];
    y[b] = x[b] * c[i] + x[a] * s[i];
  }
  for (int64_t d = 2 * kPairs; d < D; ++d) y[d] = x[d];
  for (int64_t d = 0; d < D; d += kLanes) vstore(to + d, vload(y + d));
}"""

_RUN = """  const int64_t *step = rows.strides(), *each = offsets.sizes();
  const int64_t sizes[4] = {B, H, S, D}, share = each[2] > 0 ? S / each[2] : 1;
  const int64_t per_batch = each[0] > 1 ? each[1] * each[2] : 0, per_head = each[1] > 1 ? each[2] : 0;
  Tensor out(sizes, 4, @DTYPE@);
  const T* from = rows.data<T>();
  T* to = out.mutable_data<T>();
  const int64_t* places = offsets.data<int64_t>();
  double right[kPairs];
  for (int64_t i = 0; i < kPairs; ++i)
    right[i] = static_cast<double>(pace.data<float>()[i]) * 0.63661977236758134308;
  parallel_for(0, B * S, 1 + (1 << 13) / (H * D + 1), [&](int64_t begin, int64_t end) {
    alignas(64) float c[kPairs], s[kPairs];
    int64_t last = 0;
    angles(0, right, c, s);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / S, row = i % S;
@ROW@
      for (int64_t h = 0; h < H; ++h) {
        const int64_t offset = places[b * per_batch + h * per_head + row / share];
        if (offset != last) angles(static_cast<double>(last = offset), right, c, s);
        rotate(at + h * step[1], c, s, to + ((b * H + h) * S + row) * D);
      }
    }
  });
  stack[0] = out.release();"""

_PAGED_ROW = """      const int64_t id = page_table.data<int32_t>()[b * n + row / P];
      if (id < 0) {
        for (int64_t h = 0; h < H; ++h) std::memset(to + ((b * H + h) * S + row) * D, 0, D * sizeof(T));
        continue;
      }
      const T* at = from + id * step[0] + row % P * step[2];"""
_PLAIN_ROW = "      const T* at = from + b * step[0] + row * step[2];"


def _arguments(key: KernelKey) -> list[str]:
    dtype, paged = dtype_constant(key.dtype), bool(config_of(key)["page"])
    int32, int64, float32 = (dtype_constant(name) for name in ("int32", "int64", "float32"))
    lines = [f"  Tensor {name}(stack[{i}]);" for i, name in enumerate(rotate_names(key))]
    lines += [
        require(
            f"rows.is_cpu({dtype}) && rows.dim() == 4 && rows.sizes()[3] == D && rows.strides()[3] == 1"
            f"{' && rows.sizes()[2] == P' if paged else ''}",
            f"rows must be [{'N, Hkv, P' if paged else 'B, Hkv, S'}, D], contiguous in the last axis",
        ),
        require(f"pace.is_cpu({float32}) && pace.numel() == kPairs", "pace must be float32 [R / 2]"),
        f"  pace.make_contiguous({float32});",
        "  const int64_t H = rows.sizes()[1];",
    ]
    if paged:
        lines += [
            require(
                f"page_table.is_cpu({int32}) && page_table.dim() == 2", "page_table must be int32 with 2 axes"
            ),
            f"  page_table.make_contiguous({int32});",
            "  const int64_t B = page_table.sizes()[0], n = page_table.sizes()[1], S = n * P;",
            "  for (int64_t i = 0; i < B * n; ++i)",
            "  "
            + require(
                "page_table.data<int32_t>()[i] < rows.sizes()[0]", "page_table names a page that is not there"
            ),
        ]
    else:
        lines.append("  const int64_t B = rows.sizes()[0], S = rows.sizes()[2];")
    lines += [
        require(
            f"offsets.is_cpu({int64}) && offsets.dim() == 3 && (offsets.sizes()[0] == 1 || "
            "offsets.sizes()[0] == B) && (offsets.sizes()[1] == 1 || offsets.sizes()[1] == H) && "
            "(offsets.sizes()[2] > 0 ? S % offsets.sizes()[2] == 0 : S == 0)",
            "offsets must be int64 [1 or B, 1 or Hkv, L] with L a divisor of the rows",
        ),
        f"  offsets.make_contiguous({int64});",
    ]
    return lines


def generate(key: KernelKey, op: str) -> str:
    """The source for one configuration."""
    config = config_of(key)
    head = f"""using T = {ELEMENT[key.dtype]};
constexpr int64_t D = {config["head"]}, kPairs = {config["turned"] // 2};"""
    if config["page"]:
        head += f"\nconstexpr int64_t P = {config['page']};"
    words = {
        "SINE": polynomial(SINE, "f"),
        "COSINE": polynomial(COSINE, "f"),
        "FIRST": "2 * i" if config["interleaved"] else "i",
        "SECOND": "2 * i + 1" if config["interleaved"] else "i + kPairs",
        "ROW": _PAGED_ROW if config["page"] else _PLAIN_ROW,
        "DTYPE": dtype_constant(key.dtype),
    }
    entry = "\n".join(["void run(StableIValue* stack, uint64_t, uint64_t) {", *_arguments(key), _RUN, "}"])
    text = f"{head}\n\n{_TURN}\n\n{entry}"
    for name, word in words.items():
        text = text.replace(f"@{name}@", word)
    return cpp_file(
        title=f"Rows with a rotary embedding turned, {key.dtype}, heads of {config['head']}.",
        note="Angles are reduced in double, rows are rounded once.",
        target=str(key.target),
        vector=vector_text(key.target.arch, {key.dtype}),
        body=text,
        op=op,
        schema=rotate_schema(key),
    )
