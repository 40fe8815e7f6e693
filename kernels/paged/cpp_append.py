"""C++ for paged_append: rows into their pages, and the extremes of the keys of each page."""

from __future__ import annotations

from tilewright.kernels.common.cpp import cpp_file, dtype_constant, require, vector_text
from tilewright.kernels.common.family import config_of
from tilewright.kernels.paged.cpp import head_text, index_checks, pool_checks
from tilewright.kernels.paged.cpp_rows import KEEP_PACKED, pack_text, pages_text, row_format
from tilewright.kernels.paged.signature import append_names, append_schema, is_packed
from tilewright.runtime.contracts import KernelKey

_EXTREMES = {
    "avx2": """// The less (greater) of two, a NaN where either is one.
inline Vec vkeep_nan(Vec a, Vec x) { return _mm256_or_ps(x, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
inline Vec vleast(Vec a, Vec b) { return vkeep_nan(a, _mm256_min_ps(a, b)); }
inline Vec vmost(Vec a, Vec b) { return vkeep_nan(a, _mm256_max_ps(a, b)); }""",
    "avx512": """// The less (greater) of two, a NaN where either is one.
inline Vec vkeep_nan(Vec a, Vec x) {
  return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
inline Vec vleast(Vec a, Vec b) { return vkeep_nan(a, _mm512_min_ps(a, b)); }
inline Vec vmost(Vec a, Vec b) { return vkeep_nan(a, _mm512_max_ps(a, b)); }""",
}

_PLANES = """
          T *least = low_p + id * l_step[0] + g * l_step[1], *most = high_p + id * h_step[0] + g * h_step[1];
          if (slot == 0) {
            std::memcpy(least, kr, D * sizeof(T));
            std::memcpy(most, kr, D * sizeof(T));
          } else {
            for (int64_t d = 0; d < D; d += kLanes) {
              const Vec x = vload(kr + d);
              vstore(least + d, vleast(vload(least + d), x));
              vstore(most + d, vmost(vload(most + d), x));
            }
          }"""

_KEEP = {
    "@KEEP_KEY@": "std::memcpy(kp, kr, D * sizeof(T))",
    "@KEEP_VALUE@": "std::memcpy(vp, vr, E * sizeof(T))",
}

_RUN = """  const int32_t* table = page_table.data<int32_t>();
  const int64_t* start = starts.data<int64_t>();
  for (int64_t b = 0; b < B; ++b) {
    if (tokens == 0) break;
    bool held = start[b] >= 0 && start[b] + tokens <= n * P;
    for (int64_t i = start[b] / P; held && i <= (start[b] + tokens - 1) / P; ++i)
      held = table[b * n + i] >= 0 && table[b * n + i] < N;
    require(held, "a position to be written has no page in page_table");
  }
  const int64_t *ks = k_pages.strides(), *vs = v_pages.strides(), *kt = k.strides(), *vt = v.strides();
  const T *from_k = k.data<T>(), *from_v = v.data<T>();
  @ROW@ *to_k = k_pages.mutable_data<@ROW@>(), *to_v = v_pages.mutable_data<@ROW@>();
@PLANES@  parallel_for(0, B * Hkv, tokens * (D + E) > 0 ? 1 + (1 << 15) / (tokens * (D + E)) : 1,
               [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / Hkv, g = i % Hkv;
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t at = start[b] + t, id = table[b * n + at / P], slot = at % P;
        const T* kr = from_k + b * kt[0] + g * kt[1] + t * kt[2];
        const T* vr = from_v + b * vt[0] + g * vt[1] + t * vt[2];
        @ROW@* kp = to_k + id * ks[0] + g * ks[1] + slot * ks[2];
        @ROW@* vp = to_v + id * vs[0] + g * vs[1] + slot * vs[2];
        @KEEP_KEY@;
        @KEEP_VALUE@;@EXTREMES@
      }
    }
  });"""


def _arguments(key: KernelKey) -> list[str]:
    dtype, names = dtype_constant(key.dtype), append_names(key)
    lines = [f"  Tensor {name}(stack[{i}]);" for i, name in enumerate(names)]
    lines += pool_checks(key, "k")
    for name, size in (("k", "D"), ("v", "E")):
        lines.append(
            require(
                f"{name}.is_cpu({dtype}) && {name}.dim() == 4 && {name}.sizes()[0] == B && {name}.sizes()[1] "
                f"== Hkv && {name}.sizes()[2] == k.sizes()[2] && {name}.sizes()[3] == {size}",
                f"{name} must be [B, Hkv, T, {size}] in the pool's dtype",
            )
        )
        lines.append(f"  if ({name}.strides()[3] != 1) {name}.make_contiguous({dtype});")
    lines += ["  const int64_t tokens = k.sizes()[2];", *index_checks("page_table", "int32", 2)]
    lines += ["  const int64_t n = page_table.sizes()[1];", *index_checks("starts", "int64", 1)]
    for name in names[6:]:
        lines.append(
            require(
                f"{name}.is_cpu({dtype}) && {name}.dim() == 3 && {name}.sizes()[0] == N && "
                f"{name}.sizes()[1] == Hkv && {name}.sizes()[2] == D && {name}.strides()[2] == 1",
                f"{name} must be [N, Hkv, D] in the pool's dtype",
            )
        )
    return lines


def generate(key: KernelKey, op: str) -> str:
    """The source for one configuration."""
    planes, packed, arch = bool(config_of(key).get("planes")), is_packed(key), key.target.arch
    pointers = """  T *low_p = low.mutable_data<T>(), *high_p = high.mutable_data<T>();
  const int64_t *l_step = low.strides(), *h_step = high.strides();
"""
    run = _RUN.replace("@PLANES@", pointers if planes else "").replace(
        "@EXTREMES@", _PLANES if planes else ""
    )
    run = row_format(key).fill(run)
    for name, call in KEEP_PACKED.items() if packed else _KEEP.items():
        run = run.replace(name, call)
    body = [head_text(key), *([_EXTREMES[arch]] if planes or packed else [])]
    body += [pack_text(arch)] if packed else []
    body.append(
        "\n".join(["void run(StableIValue* stack, uint64_t, uint64_t) {", *_arguments(key), run, "}"])
    )
    return cpp_file(
        title=f"Appending to a paged pool, {key.dtype}, {pages_text(key)}.",
        note="A row is rounded on its own." if packed else "Rows are copied bit for bit.",
        target=str(key.target),
        vector=vector_text(arch, {key.dtype, *(("divide",) if packed else ())}),
        body="\n\n".join(body),
        op=op,
        schema=append_schema(key),
        includes=("cmath",) if packed else (),
    )
