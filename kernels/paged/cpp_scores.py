"""C++ for page_bounds, and for the column sums of attention (attention_mass)."""

from __future__ import annotations

from tilewright.kernels.block_sparse_attention.cpp_core import isa_text
from tilewright.kernels.common.cpp import ELEMENT, LANES, cpp_file, dtype_constant, require, vector_text
from tilewright.kernels.common.family import config_of
from tilewright.kernels.paged.cpp import index_checks
from tilewright.kernels.paged.cpp_core import sum4_text
from tilewright.kernels.paged.cpp_top import TOP
from tilewright.kernels.paged.signature import bounds_names, bounds_schema, mass_schema, pick_schema
from tilewright.runtime.contracts import KernelKey

_BOUNDS = """// For M query rows: a positive q_d meets the greatest key, a negative one the least.
template <int M>
inline __attribute__((always_inline)) void bounds(
    const float* above, const float* below, const T* const* most, const T* const* least, float* s) {
  Vec sum[M][4];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = vset(0.0f);
  for (int64_t d = 0; d < D; d += kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec high = vload(most[j] + d), low = vload(least[j] + d);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i)
        sum[i][j] = vfma(vload(above + i * D + d), high, vfma(vload(below + i * D + d), low, sum[i][j]));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
    _mm_storeu_ps(s + i * 4, vsum4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
}

// The least and greatest keys of a pool's pages, and the steps from page to page and head to head.
struct Planes {
  const T *low, *high;
  int64_t l_page, l_head, h_page, h_head;
};

// Pages begin .. end - 1 of one sequence, all its heads: they lie side by side in memory. to: [heads, n].
void score(const float* above, const float* below, int64_t G, int64_t heads, const Planes& x,
           const int32_t* table, int64_t begin, int64_t end, int64_t first, int64_t length, float* to,
           int64_t n) {
  for (int64_t i = begin; i < end; i += 4) {
    const T *least[4], *most[4];
    int64_t id[4];
    bool holds[4];
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t p = i + j < end ? i + j : end - 1, start = p * kPage;
      holds[j] = table[p] >= 0 && start < length && start + kPage > first;
      id[j] = table[p] < 0 ? 0 : table[p];
      const int64_t next = i + j + 8 < end && table[i + j + 8] >= 0 ? table[i + j + 8] : 0;
      for (int64_t g = 0; g < heads; ++g)
        for (int64_t d = 0; d < D; d += 64 / sizeof(T)) {
          const T* low = x.low + next * x.l_page + g * x.l_head + d;
          const T* high = x.high + next * x.h_page + g * x.h_head + d;
          _mm_prefetch(reinterpret_cast<const char*>(low), _MM_HINT_T0);
          _mm_prefetch(reinterpret_cast<const char*>(high), _MM_HINT_T0);
        }
    }
    for (int64_t g = 0; g < heads; ++g) {
      for (int64_t j = 0; j < 4; ++j) {
        least[j] = x.low + id[j] * x.l_page + g * x.l_head;
        most[j] = x.high + id[j] * x.h_page + g * x.h_head;
      }
      float s[3 * 4], best[4];
      for (int64_t r = 0; r < G;) {
        const int64_t some = G - r < 3 ? G - r : 3;
        const float *up = above + (g * G + r) * D, *down = below + (g * G + r) * D;
        switch (some) {
          case 1: bounds<1>(up, down, most, least, s); break;
          case 2: bounds<2>(up, down, most, least, s); break;
          case 3: bounds<3>(up, down, most, least, s); break;
        }
        for (int64_t m = 0; m < some; ++m)
          for (int64_t j = 0; j < 4; ++j) {
            const float x = s[m * 4 + j];
            best[j] = r + m == 0 ? x : @JOIN@;
          }
        r += some;
      }
      for (int64_t j = 0; j < 4 && i + j < end; ++j)
        to[g * n + i + j] = holds[j] ? best[j] : -std::numeric_limits<float>::infinity();
    }
  }
}"""

_BOUNDS_RUN = """  const int64_t G = H / Hkv;
  std::vector<float> rows(2 * B * H * D);
  float *above = rows.data(), *below = above + B * H * D;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h) {
      const T* from = q.data<T>() + b * q.strides()[0] + h * q.strides()[1];
      for (int64_t d = 0; d < D; d += kLanes) {
        const Vec x = vload(from + d);
        vstore(above + (b * H + h) * D + d, vmax(vset(0.0f), x));
        vstore(below + (b * H + h) * D + d, vmin(vset(0.0f), x));
      }
    }
@RESULT@
  const int64_t *ls = low.strides(), *hs = high.strides();
  const Planes planes{low.data<T>(), high.data<T>(), ls[0], ls[1], hs[0], hs[1]};
  const int32_t* table = page_table.data<int32_t>();
  const int64_t* length = lengths.data<int64_t>();
  constexpr int64_t kStep = 64;  // pages of a task
  const int64_t steps = (n + kStep - 1) / kStep;
  parallel_for(0, N > 0 ? B * steps : 0, 1 + (1 << 14) / (kStep * D * Hkv), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / steps, from = i % steps * kStep;
      score(above + b * H * D, below + b * H * D, G, Hkv, planes, table + b * n, from,
            from + kStep < n ? from + kStep : n, @FIRST@, length[b], to + b * Hkv * n, n);
    }
  });
  if (N == 0)
    for (int64_t i = 0; i < B * Hkv * n; ++i) to[i] = -std::numeric_limits<float>::infinity();
@END@"""

_RESULT = """  const int64_t sizes[3] = {B, Hkv, n};
  Tensor out(sizes, 3, aoti_torch_dtype_float32());
  float* to = out.mutable_data<float>();"""

_PICK_RESULT = """  const int64_t some = count < n ? count : n, sizes[3] = {B, Hkv, some};
  Tensor out(sizes, 3, @INT32@);
  std::vector<float> found(B * Hkv * n);
  float* to = found.data();"""

_PICK_END = """  const auto force = [&](int64_t b, int64_t token) {  // before all others, but a NaN
    const int64_t place = token >= 0 ? token / kPage : -1;
    for (int64_t g = 0; g < Hkv && place >= 0 && place < n; ++g)
      to[(b * Hkv + g) * n + place] = std::numeric_limits<float>::infinity();
  };
  for (int64_t b = 0; b < B; ++b) {
    force(b, length[b] - 1);@SINK@
  }
  int32_t* picked = out.mutable_data<int32_t>();
  parallel_for(0, B * Hkv, 1 + (1 << 14) / (n + 1), [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> order;
    for (int64_t row = begin; row < end; ++row) top(to + row * n, n, some, order, picked + row * some);
  });
  stack[0] = out.release();"""


def _bounds_arguments(key: KernelKey) -> list[str]:
    dtype, names = dtype_constant(key.dtype), bounds_names(key)
    lines = [f"  Tensor {name}(stack[{i}]);" for i, name in enumerate(names)]
    lines.append(
        require(
            f"q.is_cpu({dtype}) && q.dim() == 4 && q.sizes()[2] == 1 && q.sizes()[3] == D",
            "q must be [B, H, 1, D] in the dtype of the planes",
        )
    )
    lines += [
        require(
            f"{name}.is_cpu({dtype}) && {name}.dim() == 3 && {name}.has_shape_of(low) && "
            f"{name}.sizes()[2] == D && {name}.strides()[2] == 1",
            f"{name} must be [N, Hkv, D] in the dtype of q",
        )
        for name in ("low", "high")
    ]
    lines += [
        "  const int64_t B = q.sizes()[0], H = q.sizes()[1], N = low.sizes()[0], Hkv = low.sizes()[1];",
        require("Hkv > 0 && H % Hkv == 0", "the heads of q must be a multiple of those of low"),
        f"  if (q.strides()[3] != 1) q.make_contiguous({dtype});",
        *index_checks("page_table", "int32", 2),
        "  const int64_t n = page_table.sizes()[1];",
        "  for (int64_t i = 0; i < B * n; ++i)",
        "  " + require("page_table.data<int32_t>()[i] < N", "page_table names a page that is not there"),
        *index_checks("lengths", "int64", 1),
    ]
    return lines + (index_checks("first", "int64", 1) if "first" in names else [])


def generate_bounds(key: KernelKey, op: str) -> str:
    """page_bounds for one configuration."""
    run = _BOUNDS_RUN.replace("@RESULT@", _RESULT).replace("@END@", "  stack[0] = out.release();")
    return _bounds_file(key, op, run, [], (), bounds_schema(key))


def generate_pick(key: KernelKey, op: str) -> str:
    """pick_pages for one configuration."""
    config = config_of(key)
    sink = "\n    force(b, @FIRST@);" if config["sink"] else ""
    count = f"""  const int64_t count = static_cast<int64_t>(stack[{len(bounds_names(key))}]);
{require("count > 0", "count must be positive")}
"""
    result = _PICK_RESULT.replace("@INT32@", dtype_constant("int32"))
    run = _BOUNDS_RUN.replace("@RESULT@", result).replace("@END@", _PICK_END.replace("@SINK@", sink))
    return _bounds_file(key, op, count + run, [TOP], ("algorithm", "functional"), pick_schema(key))


def _bounds_file(
    key: KernelKey, op: str, run: str, helpers: list[str], includes: tuple[str, ...], schema: str
) -> str:
    config = config_of(key)
    join = "best[j] + x" if config.get("group") == "sum" else "x > best[j] || x != x ? x : best[j]"
    run = run.replace("@FIRST@", "first.data<int64_t>()[b]" if config["first"] else "0")
    head = f"""using T = {ELEMENT[key.dtype]};
constexpr int64_t D = {config["head"]}, kPage = {config["page"]};"""
    entry = ["void run(StableIValue* stack, uint64_t, uint64_t) {", *_bounds_arguments(key), run, "}"]
    body = [head, isa_text(key.target.arch), sum4_text(key.target.arch), _BOUNDS.replace("@JOIN@", join)]
    return cpp_file(
        title=f"Bounds of the scores of pages, {key.dtype}, heads of {config['head']}.",
        note="Sums run in float32.",
        target=str(key.target),
        vector=vector_text(key.target.arch, {"sum", "max", key.dtype}),
        body="\n\n".join([*body, *helpers, "\n".join(entry)]),
        op=op,
        schema=schema,
        includes=(*includes, "limits", "vector"),
    )


_MASS = """constexpr int64_t kKeys = 16;  // a register tile: 1 query row and 4 x 4 keys at a time

// Columns begin .. end - 1 of one key head: sum over its rows of exp2(q . k - lse); q is scaled.
void columns(const float* q, const float* lse, const int64_t* reach, int64_t rows, const T* k, int64_t step,
             int64_t begin, int64_t end, float* to) {
  alignas(64) float tile[kKeys * D], s[kKeys];
  for (int64_t j = begin; j < end; j += kKeys) {
    const int64_t some = end - j < kKeys ? end - j : kKeys;
    for (int64_t i = 0; i < kKeys; ++i) {
      const T* from = k + (j + (i < some ? i : some - 1)) * step;
      for (int64_t d = 0; d < D; d += kLanes) vstore(tile + i * D + d, vload(from + d));
    }
    Vec total[kKeys / kLanes];
    for (Vec& x : total) x = vset(0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      if (reach[r] <= j) continue;  // sees none of them
      for (int64_t i = 0; i < kKeys; i += 4) {
        Vec a = vset(0.0f), b = a, c = a, e = a;
        for (int64_t d = 0; d < D; d += kLanes) {
          const Vec x = vload(q + r * D + d);
          const float* y = tile + i * D + d;
          a = vfma(x, vload(y), a);
          b = vfma(x, vload(y + D), b);
          c = vfma(x, vload(y + 2 * D), c);
          e = vfma(x, vload(y + 3 * D), e);
        }
        _mm_store_ps(s + i, vsum4(a, b, c, e));
      }
      for (int64_t i = reach[r] - j; i < kKeys; ++i) s[i] = -1e30f;
      for (int64_t i = 0; i < kKeys / kLanes; ++i)
        total[i] = vadd(total[i], vexp2(vadd(vload(s + i * kLanes), vset(-lse[r]))));
    }
    for (int64_t i = 0; i < kKeys / kLanes; ++i) vstore(s + i * kLanes, total[i]);
    std::memcpy(to + j, s, some * sizeof(float));
  }
}"""

_MASS_RUN = """  const int64_t G = H / Hkv, rows = tokens * G;
  std::vector<float> scaled(B * H * tokens * D), sums(B * H * tokens);
  std::vector<int64_t> reach(rows);
  const float factor = static_cast<float>(scale * 1.4426950408889634);
  for (int64_t r = 0; r < rows; ++r) reach[r] = @REACH@;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t row = (b * H + h) * tokens + t;
        const T* from = q.data<T>() + b * q.strides()[0] + h * q.strides()[1] + t * q.strides()[2];
        const float x = lse.data<float>()[row];
        for (int64_t d = 0; d < D; d += kLanes)
          vstore(&scaled[row * D + d], vmul(vset(factor), vload(from + d)));
        sums[row] = x == -std::numeric_limits<float>::infinity() ? 1e30f : x * 1.44269504f;  // gives 0
      }
  const int64_t sizes[3] = {B, Hkv, S};
  Tensor out(sizes, 3, aoti_torch_dtype_float32());
  float* to = out.mutable_data<float>();
  constexpr int64_t kStep = 8 * kKeys;  // columns of a task
  const int64_t steps = (S + kStep - 1) / kStep;
  parallel_for(0, B * Hkv * steps, 1 + (1 << 12) / (rows * D + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / steps / Hkv, g = i / steps % Hkv, from = i % steps * kStep;
      const int64_t row = (b * H + g * G) * tokens;
      columns(&scaled[row * D], &sums[row], reach.data(), rows,
              k.data<T>() + b * k.strides()[0] + g * k.strides()[1], k.strides()[2], from,
              from + kStep < S ? from + kStep : S, to + (b * Hkv + g) * S);
    }
  });@FIRST@
  stack[0] = out.release();"""

_MASS_FIRST = """
  for (int64_t b = 0; b < B; ++b)
    for (int64_t g = 0; g < Hkv; ++g)
      for (int64_t j = 0; j < S && j < first.data<int64_t>()[b]; ++j) to[(b * Hkv + g) * S + j] = 0.0f;"""


def _mass_arguments(key: KernelKey) -> list[str]:
    dtype, padded = dtype_constant(key.dtype), bool(config_of(key)["first"])
    names = ["q", "k", "lse", *(["first"] if padded else [])]
    lines = [f"  Tensor {name}(stack[{i}]);" for i, name in enumerate(names)]
    lines.append(f"  const double scale = to_double(stack[{len(names)}]);")
    for name in ("q", "k"):
        lines.append(
            require(
                f"{name}.is_cpu({dtype}) && {name}.dim() == 4 && {name}.sizes()[0] == q.sizes()[0] && "
                f"{name}.sizes()[3] == D",
                "q and k must be [B, H, T, D] and [B, Hkv, S, D] of one dtype",
            )
        )
        lines.append(f"  if ({name}.strides()[3] != 1) {name}.make_contiguous({dtype});")
    float32 = dtype_constant("float32")
    lines += [
        "  const int64_t B = q.sizes()[0], H = q.sizes()[1], tokens = q.sizes()[2];",
        "  const int64_t Hkv = k.sizes()[1], S = k.sizes()[2];",
        require("Hkv > 0 && H % Hkv == 0", "the heads of q must be a multiple of those of k"),
        require(f"lse.is_cpu({float32}) && lse.numel() == B * H * tokens", "lse must be [B, H, T] float32"),
        f"  lse.make_contiguous({float32});",
    ]
    return lines + (index_checks("first", "int64", 1) if padded else [])


def generate_mass(key: KernelKey, op: str) -> str:
    """attention_mass for one configuration."""
    config = config_of(key)
    reach = "S - tokens + r % tokens + 1" if config["causal"] else "S"
    run = _MASS_RUN.replace("@REACH@", reach).replace("@FIRST@", _MASS_FIRST if config["first"] else "")
    head = f"""using T = {ELEMENT[key.dtype]};
constexpr int64_t D = {config["head"]};"""
    entry = ["void run(StableIValue* stack, uint64_t, uint64_t) {", *_mass_arguments(key), run, "}"]
    body = [head, isa_text(key.target.arch), sum4_text(key.target.arch), _MASS, "\n".join(entry)]
    assert 16 % LANES[key.target.arch] == 0, "kKeys in the text is a whole number of vectors"
    return cpp_file(
        title=f"Column sums of attention, {key.dtype}, heads of {config['head']}.",
        note="Sums run in float32.",
        target=str(key.target),
        vector=vector_text(key.target.arch, {"sum", "max", key.dtype}),
        body="\n\n".join(body),
        op=op,
        schema=mass_schema(key),
        includes=("limits", "vector"),
    )
