"""C++ for block_mass: the scores of the attention core once more, exponentials, and one sum a block.

K is packed once per head, each block from a panel of its own, with a bias beside it: 0 for keys, very
negative for masked ones and for the rest of a panel. A task is one block of queries of one head; nobody else
writes its row of the result.
"""

from __future__ import annotations

from tilewright.kernels.block_sparse_attention.cpp import TILE_ROWS
from tilewright.kernels.block_sparse_attention.cpp_core import (
    EMPTY,
    ROWS,
    isa_text,
    pack_keys_text,
    tile_text,
)
from tilewright.kernels.block_sparse_attention.cpp_jobs import LEASE
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
from tilewright.runtime.contracts import KernelKey

QUERY_ROWS = 64
"""Queries at a time: with KEYS scores each they stay in L1."""
KEYS = 64


def schema(key: KernelKey) -> str:
    """The kernel op's arguments; an absent mask is no argument."""
    return f"({', '.join(f'Tensor {name}' for name in _names(key))}, float scale) -> Tensor"


def _names(key: KernelKey) -> list[str]:
    return ["q", "k", "lse", "q_off", "k_off", *(["mask"] if config_of(key)["mask"] else [])]


def _head(key: KernelKey) -> str:
    return f"""using T = {ELEMENT[key.dtype]};
constexpr int64_t D = {config_of(key)["head"]}, kNR = {2 * LANES[key.target.arch]};
constexpr int64_t kRows = {QUERY_ROWS}, kKeys = {KEYS};

// The rows of one head, `step` elements apart.
struct Heads {{
  const T* data;
  int64_t step;
}};
inline const T* at(const Heads& x, int64_t slot) {{ return x.data + slot * x.step; }}
inline int64_t round_up(int64_t n) {{ return (n + kNR - 1) / kNR * kNR; }}"""


_MASS = f"""// What a thread computes with: scaled rows, their scores, and minus their lse in powers of two.
struct Scratch {{
  float *q, *scores, *minus;
  static constexpr int64_t kFloats = (kRows * (D + kKeys + 1) + 15) / 16 * 16;
  explicit Scratch(float* p) : q(p), scores(p + kRows * D), minus(p + kRows * (D + kKeys)) {{}}
}};

// Probabilities of `rows` queries and n packed keys (whole panels), summed.
inline float mass_of(const Scratch& w, int64_t rows, const float* kp, const float* bias, int64_t n) {{
  Vec sum0 = vset(0.0f), sum1 = sum0;
  const Vec most = vset(127.0f);
  for (int64_t from = 0; from < n; from += kKeys) {{
    const int64_t to = n - from < kKeys ? n - from : kKeys;
    for (int64_t j = 0; j < to; j += kNR)
      tiles<true>(rows, w.q, D, kp + (from + j) * D, D, w.scores + j, kKeys, nullptr);
    for (int64_t i = 0; i < rows; ++i) {{
      const Vec minus = vset(w.minus[i]);
      const float* s = w.scores + i * kKeys;
      for (int64_t j = 0; j < to; j += kNR) {{
        const Vec b0 = vadd(minus, vload(bias + from + j));
        const Vec b1 = vadd(minus, vload(bias + from + j + kLanes));
        sum0 = vadd(sum0, vexp2(vmin(most, vadd(vload(s + j), b0))));
        sum1 = vadd(sum1, vexp2(vmin(most, vadd(vload(s + j + kLanes), b1))));
      }}
    }}
  }}
  return vsum(vadd(sum0, sum1));
}}

// A row of the result: queries first .. last - 1 of one head against every block of keys.
inline void mass_row(const Scratch& w, const Heads& q, const float* lse, int64_t first, int64_t last,
                     float scale, const float* kp, const float* bias, const int64_t* start, int64_t nK,
                     float* out) {{
  std::memset(out, 0, nK * sizeof(float));
  for (int64_t r = first; r < last; r += kRows) {{
    const int64_t rows = last - r < kRows ? last - r : kRows;
    for (int64_t i = 0; i < rows; ++i) {{
      widen(at(q, r + i), D, w.q + i * D, scale * 1.44269504f);
      const float whole = lse[r + i];
      w.minus[i] = whole == -std::numeric_limits<float>::infinity() ? {EMPTY} : -whole * 1.44269504f;
    }}
    for (int64_t block = 0; block < nK; ++block) {{
      const int64_t from = start[block];
      out[block] += mass_of(w, rows, kp + from * D, bias + from, start[block + 1] - from);
    }}
  }}
}}

inline bool rises(const int32_t* row, int64_t n, int64_t most) {{
  for (int64_t i = 0; i < n; ++i)
    if (row[i] < (i == 0 ? 0 : row[i - 1])) return false;
  return n > 0 && row[0] == 0 && row[n - 1] <= most;
}}"""


def _arguments(key: KernelKey) -> list[str]:
    names, dtype = _names(key), dtype_constant(key.dtype)
    float32, int32 = dtype_constant("float32"), dtype_constant("int32")
    lines = [f"  Tensor {name}(stack[{i}]);" for i, name in enumerate(names)]
    lines.append(f"  const float scale = static_cast<float>(to_double(stack[{len(names)}]));")
    for name in ("q", "k"):
        held = f"{name}.is_cpu({dtype}) && {name}.dim() == 4 && {name}.sizes()[3] == D"
        lines.append(require(held, f"{name} must be a {key.dtype} tensor [B, H, S, D] on the CPU"))
        lines.append(f"  if ({name}.strides()[3] != 1) {name}.make_contiguous({dtype});")
    lines.append("  const int64_t B = q.sizes()[0], H = q.sizes()[1], S = q.sizes()[2], N = k.sizes()[2];")
    lines.append(
        require("k.sizes()[0] == B && k.sizes()[1] == H", "q and k must have one batch size and heads")
    )
    sizes = "lse.sizes()[0] == B && lse.sizes()[1] == H && lse.sizes()[2] == S"
    sums = f"lse.is_cpu({float32}) && lse.dim() == 3 && {sizes}"
    lines += [require(sums, "lse must be float32 [B, H, S]"), f"  lse.make_contiguous({float32});"]
    for name, most in (("q_off", "S"), ("k_off", "N")):
        held = f"{name}.is_cpu({int32}) && {name}.dim() == 2 && {name}.sizes()[0] == 1"
        lines += [
            require(held, f"{name} must be int32 with one row"),
            f"  {name}.make_contiguous({int32});",
            require(
                f"rises({name}.data<int32_t>(), {name}.sizes()[1], {most})",
                f"{name} must rise from 0 to at most the number of tokens",
            ),
        ]
    if config_of(key)["mask"]:
        fits = " && ".join(
            f"(mask.sizes()[{i}] == 1 || mask.sizes()[{i}] == {n})" for i, n in ((0, "B"), (1, "H"))
        )
        held = f"mask.is_cpu({dtype_constant('bool')}) && mask.dim() == 4 && {fits}"
        lines.append(
            require(
                f"{held} && mask.sizes()[2] == 1 && mask.sizes()[3] == N", "the mask must be [B, H, 1, T]"
            )
        )
    return lines


def _run(key: KernelKey) -> str:
    arguments = "\n".join(_arguments(key))
    kept, strides = "j < n", ""
    if config_of(key)["mask"]:
        kept = "j < n && seen[(first + j) * mt[3]] != 0"
        strides = """
      const int64_t *ms = mask.sizes(), *mt = mask.strides();
      const uint8_t* seen = mask.data<uint8_t>() + (ms[0] == 1 ? 0 : head / H * mt[0]) +
                            (ms[1] == 1 ? 0 : head % H * mt[1]);"""
    return f"""void run(StableIValue* stack, uint64_t, uint64_t) {{
{arguments}
  const int64_t nQ = q_off.sizes()[1] - 1, nK = k_off.sizes()[1] - 1;
  const int64_t out_sizes[4] = {{B, H, nQ, nK}};
  Tensor out(out_sizes, 4, {dtype_constant("float32")});
  const int32_t *rows = q_off.data<int32_t>(), *keys = k_off.data<int32_t>();
  std::vector<int64_t> start(nK + 1);
  for (int64_t i = 0; i < nK; ++i) start[i + 1] = start[i] + round_up(keys[i + 1] - keys[i]);
  const int64_t packed = start[nK], threads = thread_count();
  Lease lease(B * H * packed * (D + 1) + threads * Scratch::kFloats);
  float* const kp = lease.data() + threads * Scratch::kFloats;
  float* const bias = kp + B * H * packed * D;
  const auto head_of = [](const Tensor& x, int64_t head) -> Heads {{
    const int64_t heads = x.sizes()[1], *step = x.strides();
    return {{x.data<T>() + head / heads * step[0] + head % heads * step[1], step[2]}};
  }};
  parallel_for(0, B * H * nK, 1, [&](int64_t begin, int64_t end) {{
    for (int64_t i = begin; i < end; ++i) {{
      const int64_t head = i / nK, block = i % nK, first = keys[block], n = keys[block + 1] - first;{strides}
      pack_keys(head_of(k, head), first, n, kp + (head * packed + start[block]) * D);
      float* to = bias + head * packed + start[block];
      for (int64_t j = 0; j < round_up(n); ++j) to[j] = {kept} ? 0.0f : {EMPTY};
    }}
  }});
  std::atomic<int64_t> next{{0}};
  const float* sums = lse.data<float>();
  float* result = out.mutable_data<float>();
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {{
    if (begin == end) return;
    const Scratch w(lease.data() + begin * Scratch::kFloats);
    for (int64_t i; (i = next++) < B * H * nQ;) {{
      const int64_t head = i / nQ, block = i % nQ;
      mass_row(w, head_of(q, head), sums + head * S, rows[block], rows[block + 1], scale,
               kp + head * packed * D, bias + head * packed, start.data(), nK, result + i * nK);
    }}
  }});
  stack[0] = out.release();
}}"""


def generate(key: KernelKey, op: str) -> str:
    """The source for one configuration: head size, dtype, mask or none."""
    arch = key.target.arch
    parts = [
        isa_text(arch),
        _head(key),
        tile_text(TILE_ROWS[arch]),
        TRANSPOSE8,
        ROWS,
        pack_keys_text(key.dtype == "float32"),
        _MASS,
        LEASE,
        _run(key),
    ]
    return cpp_file(
        title=f"Probability mass of blocks of attention, {key.dtype} heads of {config_of(key)['head']}.",
        note="Probabilities and sums are float32.",
        target=str(key.target),
        vector=vector_text(arch, {"sum", "max", "partial", key.dtype}),
        body="\n\n".join(parts),
        op=op,
        schema=schema(key),
        includes=("sys/mman.h", "atomic", "cmath", "cstdlib", "limits", "new", "vector"),
    )
