"""C++ for linear and linear_multi with few rows of x, the decode GEMV; `cpp_panel` has that for more of them.

Such a call is bound by reading the weights. A thread that walks one row after another gets about half of
what the memory gives, because one stream keeps too few lines in flight; so each thread splits its rows into
`streams` ranges far apart and walks them side by side, with a prefetch about 1 KB ahead in each. All weights
of a call form one list of rows, shared among the threads in one parallel region. Nothing is repacked. The
rows of x are taken up to three at a time: the weight rows of the second block come from L1.
"""

from __future__ import annotations

from tilewright.kernels.common.cpp import (
    ELEMENT,
    LANES,
    TRANSPOSE8,
    cpp_file,
    dtype_constant,
    require,
    vector_text,
)
from tilewright.kernels.common.family import config_of
from tilewright.kernels.linear.cpp_panel import REGION, panel_text
from tilewright.runtime.contracts import KernelKey

STREAMS = 4
AHEAD_BYTES = 1152
BLOCK = 3
"""Rows of x held in registers at once: 3 x 4 accumulators, 3 of x and 1 of the weight fill 16 registers."""
SERIAL_BYTES = 65536
"""Below this many bytes of weights one thread does all."""


def names(key: KernelKey) -> list[tuple[str, str | None]]:
    """(weight, bias) argument names of the kernel op; bias None where that weight has none."""
    config = config_of(key)
    return [(f"w{i}", f"b{i}" if config["biases"] >> i & 1 else None) for i in range(config["count"])]


def schema(key: KernelKey) -> str:
    """`(Tensor x, Tensor w0, Tensor b0, Tensor w1, ...) -> (Tensor, ...)`."""
    given = [name for pair in names(key) for name in pair if name is not None]
    outputs = ["Tensor"] * config_of(key)["count"]
    result = outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"
    return f"({', '.join(f'Tensor {name}' for name in ['x', *given])}) -> {result}"


def dot_text(dtype: str, arch: str) -> str:
    """`dot_rows<M, S>`: M rows of x times S rows of the weights, prefetching `kAhead` bytes ahead."""
    size = 4 if dtype == "float32" else 2
    per_line = 64 // size // LANES[arch]
    step = f"{per_line} * kLanes" if per_line > 1 else "kLanes"
    return f"""// M rows of x times S rows of the weights; the rows of x are ldx apart.
template <int M, int S>
inline void dot_rows(const T* const* w, const float* x, int64_t ldx, int64_t K, float (&out)[M][S]) {{
  Vec sum[M][S];
  for (int m = 0; m < M; ++m)
    for (int s = 0; s < S; ++s) sum[m][s] = vset(0.0f);
  int64_t k = 0;
  for (; k + {step} <= K; k += {step}) {{  // one cache line of every stream
#pragma GCC unroll {STREAMS * 2}
    for (int s = 0; s < S; ++s) _mm_prefetch(reinterpret_cast<const char*>(w[s] + k) + kAhead, _MM_HINT_T0);
#pragma GCC unroll {per_line}
    for (int u = 0; u < {per_line}; ++u) {{
      Vec a[M];
#pragma GCC unroll {BLOCK}
      for (int m = 0; m < M; ++m) a[m] = vload(x + m * ldx + k + u * kLanes);
#pragma GCC unroll {STREAMS * 2}
      for (int s = 0; s < S; ++s) {{
        Vec b = vload(w[s] + k + u * kLanes);
#pragma GCC unroll {BLOCK}
        for (int m = 0; m < M; ++m) sum[m][s] = vfma(a[m], b, sum[m][s]);
      }}
    }}
  }}
  for (; k < K; k += kLanes) {{
    int64_t n = K - k < kLanes ? K - k : kLanes;
    for (int s = 0; s < S; ++s) {{
      Vec b = vload_first(w[s] + k, n);
      for (int m = 0; m < M; ++m) sum[m][s] = vfma(vload_first(x + m * ldx + k, n), b, sum[m][s]);
    }}
  }}
  for (int m = 0; m < M; ++m)
    for (int s = 0; s < S; ++s) out[m][s] = vsum(sum[m][s]);
}}"""


def _weight(key: KernelKey) -> str:
    bias = "\n  const T* bias;  // nullptr: none" if config_of(key)["biases"] else ""
    return f"""struct Weight {{
  const T* data;
  int64_t rows, stride;{bias}
  T* out;
}};"""


def _store(key: KernelKey) -> str:
    bias = config_of(key)["biases"] != 0
    narrow = key.dtype != "float32"
    add = "\n  if (w.bias != nullptr) value += widen(w.bias[row]);" if bias else ""
    value = "narrow(value)" if narrow else "value"
    helpers = ""
    if bias:
        helpers += (
            "inline float widen(T a) { return vsum(vload_first(&a, 1)); }\n"
            if narrow
            else "inline float widen(T a) { return a; }\n"
        )
    if narrow:
        helpers += (
            "inline T narrow(float a) {\n  T out;\n  vstore_first(&out, vset(a), 1);\n  return out;\n}\n"
        )
    return f"""{helpers}inline void store(const Weight& w, int64_t m, int64_t row, float value) {{{add}
  w.out[m * w.rows + row] = {value};
}}"""


def _walk(key: KernelKey) -> str:
    rows = config_of(key)["rows"]
    blocks = "\n".join(
        f"      case {m}: block<{m}, S>(w, at, x, m, K); break;" for m in range(1, min(rows, BLOCK) + 1)
    )
    loop = (
        "  block<1, S>(w, at, x, 0, K);"
        if rows == 1
        else f"""  for (int64_t m = 0; m < M; m += {BLOCK}) {{
    switch (M - m < {BLOCK} ? M - m : {BLOCK}) {{
{blocks}
    }}
  }}"""
    )
    places = ", ".join(f"{{weights, first + {s} * each}}" for s in range(config_of(key)["streams"]))
    return f"""// A place in the list of all rows of all weights.
struct Place {{
  const Weight* weight;
  int64_t row;
  Place(const Weight* first, int64_t index) : weight(first), row(index) {{ settle(); }}
  void settle() {{
    while (row >= weight->rows) row -= (weight++)->rows;
  }}
  const T* data() const {{ return weight->data + row * weight->stride; }}
  void next() {{
    ++row;
    settle();
  }}
}};

template <int M, int S>
inline void block(const T* const* w, const Place* at, const float* x, int64_t m0, int64_t K) {{
  float out[M][S];
  dot_rows<M, S>(w, x + m0 * K, K, K, out);
  for (int m = 0; m < M; ++m)
    for (int s = 0; s < S; ++s) store(*at[s].weight, m0 + m, at[s].row, out[m][s]);
}}

template <int S>
inline void rows_of_streams(const Place* at, const float* x, int64_t M, int64_t K) {{
  const T* w[S];
  for (int s = 0; s < S; ++s) w[s] = at[s].data();
{loop}
}}

// Rows [first, last) of the list, in kStreams ranges side by side.
inline void walk(const Weight* weights, int64_t first, int64_t last, const float* x, int64_t M, int64_t K) {{
  const int64_t each = (last - first) / kStreams;
  if (each > 0) {{
    Place at[kStreams] = {{{places}}};
    for (int64_t i = 0; i < each; ++i) {{
      rows_of_streams<kStreams>(at, x, M, K);
      if (i + 1 < each)
        for (Place& place : at) place.next();
    }}
  }}
  for (int64_t i = first + each * kStreams; i < last; ++i) {{
    Place at(weights, i);
    rows_of_streams<1>(&at, x, M, K);
  }}
}}"""


def _rows(key: KernelKey) -> str:
    most = config_of(key).get("rows")
    if most is None:
        return require("M >= 1", "x must have rows")
    return require(f"M >= 1 && M <= {most}", f"x must have 1 to {most} rows")


_REGION = """  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    walk(weights, total * begin / threads, total * end / threads, a, M, K);
  });"""


def _run(key: KernelKey) -> str:
    config = config_of(key)
    pairs, bias, dtype = names(key), config["biases"] != 0, dtype_constant(key.dtype)
    given = ["x", *[name for pair in pairs for name in pair if name is not None]]
    steals = "\n".join(f"  Tensor {name}(stack[{i}]);" for i, name in enumerate(given))
    lines = [
        require(f"x.is_cpu({dtype})", f"x must be a {key.dtype} tensor on the CPU"),
        require("x.dim() >= 1 && x.dim() <= kMaxAxes && x.sizes()[x.dim() - 1] > 0", "x must not be empty"),
        f"  x.make_contiguous({dtype});",
        "  const int64_t K = x.sizes()[x.dim() - 1], M = x.numel() / K;",
        _rows(key),
        "  int64_t shape[kMaxAxes];",
        "  std::memcpy(shape, x.sizes(), x.dim() * sizeof(int64_t));",
    ]
    for w, b in pairs:
        lines += [
            require(
                f"{w}.is_cpu({dtype}) && {w}.dim() == 2 && {w}.sizes()[1] == K",
                f"{w} must be a {key.dtype} matrix on the CPU with as many columns as x",
            ),
            f"  if ({w}.strides()[1] != 1) {w}.make_contiguous({dtype});",
        ]
        if b is not None:
            lines += [
                require(
                    f"{b}.is_cpu({dtype}) && {b}.dim() == 1 && {b}.sizes()[0] == {w}.sizes()[0]",
                    f"{b} must be a {key.dtype} vector on the CPU with an element per row of {w}",
                ),
                f"  {b}.make_contiguous({dtype});",
            ]
        lines += [f"  shape[x.dim() - 1] = {w}.sizes()[0];", f"  Tensor y{w[1:]}(shape, x.dim(), {dtype});"]
    rows = []
    for w, b in pairs:
        biased = f"{f'{b}.data<T>()' if b else 'nullptr'}, " if bias else ""
        rows.append(
            f"      {{{w}.data<T>(), {w}.sizes()[0], {w}.strides()[0], {biased}y{w[1:]}.mutable_data<T>()}},"
        )
    outputs = "\n".join(f"  stack[{i}] = y{i}.release();" for i in range(config["count"]))
    source = "  const float* a = x.data<float>();"
    if key.dtype != "float32":
        source = f"""  const int64_t elements = M * K;
  Tensor wide(&elements, 1, {dtype_constant("float32")});
  float* a = wide.mutable_data<float>();
  const T* narrow_x = x.data<T>();
  int64_t i = 0;
  for (; i + kLanes <= elements; i += kLanes) vstore(a + i, vload(narrow_x + i));
  vstore_first(a + i, vload_first(narrow_x + i, elements - i), elements - i);"""
    checks, table = "\n".join(lines), "\n".join(rows)
    region = REGION if "panel" in config else _REGION
    return f"""void run(StableIValue* stack, uint64_t, uint64_t) {{
{steals}
{checks}
  const Weight weights[] = {{
{table}
  }};
  int64_t total = 0;
  for (const Weight& w : weights) total += w.rows;
{source}
  const int64_t bytes = total * K * static_cast<int64_t>(sizeof(T));
  const int64_t threads = bytes < {SERIAL_BYTES} ? 1 : thread_count();
{region}
{outputs}
}}"""


def _few_rows(key: KernelKey) -> tuple[str, ...]:
    head = f"""using T = {ELEMENT[key.dtype]};
constexpr int kStreams = {config_of(key)["streams"]};
constexpr int64_t kAhead = {AHEAD_BYTES};  // bytes"""
    return head, dot_text(key.dtype, key.target.arch), _weight(key), _store(key), _walk(key)


def _panels(key: KernelKey) -> tuple[str, ...]:
    text = panel_text(key.target.arch, bias=config_of(key)["biases"] != 0)
    return f"using T = {ELEMENT[key.dtype]};", TRANSPOSE8, _weight(key), text


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration: number of weights, which have biases, and a bound on rows with
    streams, or panels."""
    config = config_of(key)
    panels, most = "panel" in config, config.get("rows", 0)
    rows = "any number of rows" if panels else f"at most {most} row{'s' if most > 1 else ''}"
    weights = "one weight" if config["count"] == 1 else f"{config['count']} weights in one parallel region"
    read = "by panels turned around in cache" if panels else "once, row-major, in place"
    return cpp_file(
        title=f"x W^T for {rows} of x: {weights}.",
        note=f"Weights are read {read}.",
        target=str(key.target),
        vector=vector_text(key.target.arch, {"sum", "partial", key.dtype}),
        body="\n\n".join((*(_panels(key) if panels else _few_rows(key)), _run(key))),
        op=op,
        schema=schema(key),
        includes=("atomic", "vector") if panels else (),
    )
