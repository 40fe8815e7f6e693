"""C++ for quantized_linear and quantized_linear_multi: any number of rows of x, one kernel.

One row (decode) is bound by reading the weights: each thread walks `streams` ranges of 8-row blocks side by
side, as kernels/linear does, and a few rows take turns; the activations are quantized once for all weights.
More rows (prefill) share an unpacked panel of 16 weight rows that stays in cache, taken from a common counter
by whichever thread is free.
"""

from __future__ import annotations

from tilewright.kernels.common.cpp import ELEMENT, cpp_file, dtype_constant, require, vector_text
from tilewright.kernels.common.family import config_of
from tilewright.kernels.quantized_linear.cpp_dot import dot
from tilewright.kernels.quantized_linear.cpp_panel import panel
from tilewright.kernels.quantized_linear.cpp_parts import (
    AHEAD_BYTES,
    STREAMS,
    Shape,
    activations,
    geometry,
    shape_of,
)
from tilewright.runtime.contracts import KernelKey

SERIAL_BYTES = 32768
"""Below this many bytes of packed weights one thread does all of a single row."""
FEW, FEW_WIDE = 3, 8
"""So many rows of x at most take turns over the weights, as a rule and of floats on AVX-512: unpacking a
panel costs more."""
SLAB = 768
"""Rows of x made ready together, a multiple of every tile: bounds the memory that a thread keeps."""


def names(key: KernelKey) -> list[tuple[str, str | None]]:
    """(weight, bias) argument names of the kernel op; bias None where that weight has none."""
    config = config_of(key)
    return [(f"w{i}", f"b{i}" if config["biases"] >> i & 1 else None) for i in range(config["count"])]


def schema(key: KernelKey) -> str:
    """`(Tensor x, Tensor w0, Tensor b0, int n0, ...) -> (Tensor, ...)`."""
    given = ["Tensor x"]
    for i, (weight, bias) in enumerate(names(key)):
        given += [f"Tensor {weight}", *([f"Tensor {bias}"] if bias is not None else []), f"int n{i}"]
    outputs = ["Tensor"] * config_of(key)["count"]
    result = outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"
    return f"({', '.join(given)}) -> {result}"


def store(key: KernelKey) -> str:
    """What a weight is to the kernel, and where 8 results of a block go."""
    bias = config_of(key)["biases"] != 0
    add = (
        """
  if (w.bias != nullptr)
    value = vadd(value, left < 8 ? vload_first(w.bias + row, left) : vload(w.bias + row));"""
        if bias
        else ""
    )
    return f"""struct Weight {{
  const uint8_t* data;
  int64_t rows, blocks;
{"  const T* bias;  // nullptr: none" + chr(10) if bias else ""}  T* out;
}};

// 8 results of row m of x, of one block of a weight.
inline void store(const Weight& w, int64_t m, int64_t block, Vec value) {{
  const int64_t row = block * 8, left = w.rows - row;{add}
  T* to = w.out + m * w.rows + row;
  if (left < 8) {{
    vstore_first(to, value, left);
  }} else {{
    vstore(to, value);
  }}
}}"""


_STREAMS = """template <int S>
inline void blocks_of_streams(const Place* at, const Row& row, int64_t m, int64_t K32) {
  const uint8_t* start[S];
  for (int s = 0; s < S; ++s) start[s] = at[s].weight->data + at[s].block * block_bytes(K32);
  Vec sum[S];
  dot_blocks<S>(start, row, K32, sum);
  for (int s = 0; s < S; ++s) store(*at[s].weight, m, at[s].block, sum[s]);
}"""


def walk(streams: str) -> str:
    """All blocks of all weights, several ranges of them side by side; `streams` has blocks_of_streams."""
    places = ", ".join(f"{{weights, first + {s} * each}}" for s in range(STREAMS))
    return f"""// A place in the list of all blocks of all weights.
struct Place {{
  const Weight* weight;
  int64_t block;
  Place(const Weight* first, int64_t index) : weight(first), block(index) {{ settle(); }}
  void settle() {{
    while (block >= weight->blocks) block -= (weight++)->blocks;
  }}
  void next() {{
    ++block;
    settle();
  }}
}};

{streams}

// Blocks [first, last) of the list times row m of x, in {STREAMS} ranges side by side.
inline void walk(const Weight* weights, int64_t first, int64_t last, const Row& row, int64_t m,
                 int64_t K32) {{
  const int64_t each = (last - first) / {STREAMS};
  if (each > 0) {{
    Place at[{STREAMS}] = {{{places}}};
    for (int64_t i = 0; i < each; ++i) {{
      blocks_of_streams<{STREAMS}>(at, row, m, K32);
      if (i + 1 < each)
        for (Place& place : at) place.next();
    }}
  }}
  for (int64_t i = first + each * {STREAMS}; i < last; ++i) {{
    Place at(weights, i);
    blocks_of_streams<1>(&at, row, m, K32);
  }}
}}"""


def rows_of_panel(before: str = "", after: str = "") -> str:
    """A tile of results, each between the texts `before` and `after` on its way to memory."""
    return f"""// R rows of x times an unpacked panel of one or two blocks, into the result from row m on.
template <int R>
inline void rows_of_panel(const Weight& w, int64_t block, const Weights* panel, const Row* rows, int64_t m,
                          int64_t K32) {{
  Vec sum[R][2];
  tile<R>(panel, rows, K32, sum);
  for (int i = 0; i < R; ++i) {{
    store(w, m + i, block, {before}sum[i][0]{after});
    if (block + 1 < w.blocks) store(w, m + i, block + 1, {before}sum[i][1]{after});
  }}
}}"""


_STEPS = """  int64_t m = 0;
  for (; m + kTile <= M; m += kTile) rows_of_panel<kTile>(w, block, panel, rows + m, first + m, K32);FOUR
  for (; m < M; ++m) rows_of_panel<1>(w, block, panel, rows + m, first + m, K32);"""
_FOUR = """
  for (; m + 4 <= M; m += 4) rows_of_panel<4>(w, block, panel, rows + m, first + m, K32);"""
_WIDE_STEPS = """  if (M >= kTile) {
    tiles<kTile>(w, block, panel, rows, first, M, K32);
  } else if (M >= 4) {
    tiles<4>(w, block, panel, rows, first, M, K32);
  } else {
    tiles<1>(w, block, panel, rows, first, M, K32);
  }"""
TILES = """// M rows of x, at least R; those that the last tile does again come out the same. A tile of few
// rows takes as long as one of many: its sums wait for themselves.
template <int R>
inline void tiles(const Weight& w, int64_t block, const Weights* panel, const Row* rows, int64_t first,
                  int64_t M, int64_t K32) {
  int64_t m = 0;
  for (; m + R <= M; m += R) rows_of_panel<R>(w, block, panel, rows + m, first + m, K32);
  if (m < M) rows_of_panel<R>(w, block, panel, rows + M - R, first + M - R, K32);
}"""


def _many(shape: Shape) -> str:
    tiles = f"\n\n{TILES}" * shape.avx512
    steps = _WIDE_STEPS if shape.avx512 else _STEPS.replace("FOUR", "" if shape.is_integer else _FOUR)
    return f"""{rows_of_panel()}{tiles}

// M rows of x times two blocks of 8 rows of a weight.
inline void multiply_panel(const Weight& w, int64_t block, Weights* panel, const Row* rows, int64_t first,
                           int64_t M, int64_t K32) {{
  const uint8_t* data = w.data + block * block_bytes(K32);
  unpack_block(data, K32, panel, 0);
  if (block + 1 < w.blocks) unpack_block(data + block_bytes(K32), K32, panel, 1);
{steps}
}}"""


WIDEN_ROW = """inline void widen_row(const T* x, int64_t K, float* to) {  // padded with zeros to whole chunks
  int64_t k = 0;
  for (; k + 8 <= K; k += 8) vstore(to + k, vload(x + k));
  if (k < K) {
    vstore(to + k, vload_first(x + k, K - k));
    k += 8;
  }
  for (; k % 32 != 0; k += 8) vstore(to + k, vset(0.0f));
}"""


def _rows(shape: Shape) -> str:
    """Scratch for the rows of x: one allocation, kept by the thread that calls."""
    extra = (
        """
    rows[m].scale = row + K32 * 32;
    rows[m].mass = rows[m].scale + groups;
    rows[m].shift = reinterpret_cast<int32_t*>(rows[m].mass + groups);
    rows[m].q = reinterpret_cast<int8_t*>(rows[m].shift + groups);"""
        if shape.is_integer
        else "\n    rows[m].mass = row + K32 * 32;"
    )
    floats = "K32 * 40 + groups * 3" if shape.is_integer else "K32 * 32 + groups"
    return f"""// Memory for every row of x, kept by the calling thread from call to call.
inline Row* scratch(int64_t M, int64_t K32) {{
  thread_local std::vector<float> memory;
  thread_local std::vector<Row> rows;
  const int64_t groups = groups_of(K32), each = ({floats} + 15) / 16 * 16;
  if (static_cast<int64_t>(memory.size()) < M * each) memory.resize(M * each);
  if (static_cast<int64_t>(rows.size()) < M) rows.resize(M);
  for (int64_t m = 0; m < M; ++m) {{
    float* row = memory.data() + m * each;
    rows[m].x = row;{extra}
  }}
  return rows.data();
}}

{WIDEN_ROW}"""


def _arguments(key: KernelKey) -> list[str]:
    """The C++ that takes the arguments off the stack, checks them and makes the outputs."""
    config, dtype = config_of(key), dtype_constant(key.dtype)
    given = ["x"]
    for i, (weight, bias) in enumerate(names(key)):
        given += [weight, *([bias] if bias is not None else []), f"n{i}"]
    lines = [
        f"  const int64_t {name} = static_cast<int64_t>(stack[{i}]);"
        if name[0] == "n"
        else f"  Tensor {name}(stack[{i}]);"
        for i, name in enumerate(given)
    ]
    lines += [
        require(f"x.is_cpu({dtype})", f"x must be a {key.dtype} tensor on the CPU"),
        require("x.dim() >= 1 && x.dim() <= kMaxAxes && x.sizes()[x.dim() - 1] > 0", "x must have columns"),
        f"  x.make_contiguous({dtype});",
        "  const int64_t K = x.sizes()[x.dim() - 1], M = x.numel() / K, K32 = (K + 31) / 32;",
        "  int64_t shape[kMaxAxes];",
        "  std::memcpy(shape, x.sizes(), x.dim() * sizeof(int64_t));",
    ]
    for i, (w, b) in enumerate(names(key)):
        lines += [
            require(
                f"{w}.is_cpu(aoti_torch_dtype_uint8()) && {w}.dim() == 2"
                f" && {w}.sizes()[0] == packed_rows(n{i}) && {w}.sizes()[1] == packed_width(K32)",
                f"{w} is not packed for the columns of x and n{i} rows",
            ),
            f"  {w}.make_contiguous(aoti_torch_dtype_uint8());",
        ]
        if b is not None:
            lines += [
                require(
                    f"{b}.is_cpu({dtype}) && {b}.dim() == 1 && {b}.sizes()[0] == n{i}",
                    f"{b} must be a {key.dtype} vector on the CPU with n{i} elements",
                ),
                f"  {b}.make_contiguous({dtype});",
            ]
        lines += [f"  shape[x.dim() - 1] = n{i};", f"  Tensor y{i}(shape, x.dim(), {dtype});"]
    rows = []
    for i, (w, b) in enumerate(names(key)):
        biased = f"{f'{b}.data<T>()' if b else 'nullptr'}, " if config["biases"] else ""
        rows.append(f"      {{{w}.data<uint8_t>(), n{i}, (n{i} + 7) / 8, {biased}y{i}.mutable_data<T>()}},")
    return [*lines, "  const Weight weights[] = {", *rows, "  };"]


def _row_loops(step: str, prepare: str) -> str:
    """few_rows and many_rows; `step` is what `prepare` is given beside a row, `prepare` the call for one of
    many."""
    return f"""// Few rows: every thread reads its share of all weights, after the first row out of its cache.
inline void few_rows(const Weight* weights, int64_t total, const T* x, int64_t M, int64_t K, int64_t K32) {{
  const Row* rows = scratch(M, K32);
  for (int64_t m = 0; m < M; ++m) {{
    widen_row(x + m * K, K, rows[m].x);
    prepare(rows[m], K32{step});
  }}
  const int64_t threads = total * block_bytes(K32) < {SERIAL_BYTES} ? 1 : thread_count();
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {{
    for (int64_t m = 0; m < M; ++m)
      walk(weights, total * begin / threads, total * end / threads, rows[m], m, K32);
  }});
}}

// M rows from row `first` on: panels of 16 weight rows are handed out one by one.
inline void many_rows(const Weight* weights, const T* x, int64_t first, int64_t M, int64_t K, int64_t K32) {{
  const Row* rows = scratch(M, K32);
  parallel_for(0, M, 8, [&](int64_t begin, int64_t end) {{
    for (int64_t m = begin; m < end; ++m) {{
      widen_row(x + (first + m) * K, K, rows[m].x);{prepare}
    }}
  }});
  int64_t panels = 0;
  for (int i = 0; i < kCount; ++i) panels += (weights[i].blocks + 1) / 2;
  std::atomic<int64_t> taken{{0}};
  const int64_t threads = thread_count();
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {{
    thread_local std::vector<Weights> memory;
    if (static_cast<int64_t>(memory.size()) < panel_size(K32) + 64) memory.resize(panel_size(K32) + 64);
    Weights* panel = memory.data() + -reinterpret_cast<uintptr_t>(memory.data()) % 64 / sizeof(Weights);
    for (int64_t index = taken++; begin < end && index < panels; index = taken++) {{
      const Weight* w = weights;
      int64_t block = index;
      for (; block >= (w->blocks + 1) / 2; ++w) block -= (w->blocks + 1) / 2;
      multiply_panel(*w, block * 2, panel, rows, first, M, K32);
    }}
  }});
}}"""


def run(key: KernelKey, *, prepares: bool, few: int, static: bool = False) -> str:
    """The kernel op. `few` rows of x at most walk over the weights one after the other; more rows are made
    ready where a format asks for it. static: with the step that the weights hold."""
    config = config_of(key)
    outputs = "\n".join(f"  stack[{i}] = y{i}.release();" for i in range(config["count"]))
    first = "step_of(weights->data, weights->rows, K32)"
    step = f", {first}" if static else ""
    prepare = f"\n      prepare(rows[m], K32{step});" if prepares else ""
    lines = _arguments(key)
    for i in range(1, config["count"] if static else 0):
        one = f"step_of(weights[{i}].data, weights[{i}].rows, K32) == {first}"
        lines.append(require(one, "weights that share activations must hold one step"))
    checks = "\n".join(lines)
    return f"""{_row_loops(step, prepare)}

void run(StableIValue* stack, uint64_t, uint64_t) {{
{checks}
  int64_t total = 0;
  for (const Weight& w : weights) total += w.blocks;
  if (M <= {few}) {{
    few_rows(weights, total, x.data<T>(), M, K, K32);
  }} else {{
    for (int64_t first = 0; first < M; first += {SLAB})
      many_rows(weights, x.data<T>(), first, M - first < {SLAB} ? M - first : {SLAB}, K, K32);
  }}
{outputs}
}}"""


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration: format, number of weights, which have biases, dtype of x."""
    config, shape = config_of(key), shape_of(key)
    head = f"""using T = {ELEMENT[key.dtype]};
constexpr int kCount = {config["count"]};  // weights
constexpr int64_t kAhead = {AHEAD_BYTES};  // bytes"""
    grids = "row" if shape.group == 0 else f"{shape.group} columns"
    activation = {
        "none": "as they are",
        "token": "int8 per row",
        "token4": "int4 per row",
        "group": f"int8 per {shape.group} columns",
        "static": "int8 of one calibrated step",
    }
    body = (head, geometry(shape), activations(shape), dot(shape), panel(shape), store(key), walk(_STREAMS))
    few = FEW if shape.is_integer or not shape.avx512 else FEW_WIDE
    text = run(key, prepares=shape.is_integer, few=few, static=shape.is_static)
    parts = (*body, _many(shape), _rows(shape), text)
    return cpp_file(
        title=f"x W^T, W int{shape.bits}, a scale per {grids}; activations {activation[shape.activation]}.",
        note="Eight weight rows lie side by side; integer products are exact.",
        target=str(key.target),
        vector=vector_text("avx2", {"sum", "partial", "abs", "max", key.dtype}),
        body="\n\n".join(parts),
        op=op,
        schema=schema(key),
        includes=("atomic", "vector"),
    )
