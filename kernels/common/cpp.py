"""C++ text shared by the generated CPU kernels: one vector type per ISA, element types, registration.

A generator asks for the snippets it uses and gets exactly these with what they need, in order, so that the
emitted file holds nothing that is switched off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tilewright.kernels.common.abi import HEADER

NAMESPACE = "tilewright_kernels"

ELEMENT = {"float32": "float", "bfloat16": "bf16", "float16": "f16"}
"""C++ element type of a torch dtype name."""
LANES = {"avx2": 8, "avx512": 16}
"""float32 lanes of a vector register."""


TRANSPOSE8 = """// d[j * kStep + i] = s[i][j] for 8 rows and 8 columns.
template <int kStep>
inline void transpose8(const float* const* s, int64_t at, float* d) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(s[i] + at);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(d + i * kStep, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(d + (i + 4) * kStep, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}"""


def _isa(avx2: str, avx512: str) -> dict[str, str]:
    return {"avx2": avx2, "avx512": avx512}


_VECTOR = _isa(
    """using Vec = __m256;
constexpr int64_t kLanes = 8;
inline Vec vset(float a) { return _mm256_set1_ps(a); }
inline Vec vadd(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec vmul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec vfma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec vload(const float* p) { return _mm256_loadu_ps(p); }
inline void vstore(float* p, Vec a) { _mm256_storeu_ps(p, a); }""",
    """using Vec = __m512;
constexpr int64_t kLanes = 16;
inline Vec vset(float a) { return _mm512_set1_ps(a); }
inline Vec vadd(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec vmul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec vfma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, Vec a) { _mm512_storeu_ps(p, a); }""",
)

_SUM = _isa(
    """inline float vsum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}""",
    "inline float vsum(Vec a) { return _mm512_reduce_add_ps(a); }",
)

_BF16 = _isa(
    """struct bf16 { uint16_t bits; };
inline Vec vload(const bf16* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline __m256i bf16_bits(Vec a) {  // round to nearest even; a NaN stays one
  __m256i bits = _mm256_castps_si256(a);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  odd = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
  __m256i near = _mm256_srli_epi32(_mm256_add_epi32(bits, odd), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(near, _mm256_set1_epi32(0x7FC0), nan);
}
inline void vstore(bf16* p, Vec a) {
  __m256i bits = bf16_bits(a);
  __m256i pair = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(pair));
}
inline Vec vround(const bf16*, Vec a) { return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(a), 16)); }""",
    """struct bf16 { uint16_t bits; };
inline Vec vload(const bf16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline __m512i bf16_bits(Vec a) {  // round to nearest even; a NaN stays one
  __m512i bits = _mm512_castps_si512(a);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  odd = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  __m512i near = _mm512_srli_epi32(_mm512_add_epi32(bits, odd), 16);
  return _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
}
inline void vstore(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bf16_bits(a)));
}
inline Vec vround(const bf16*, Vec a) { return _mm512_castsi512_ps(_mm512_slli_epi32(bf16_bits(a), 16)); }""",
)

_F16 = _isa(
    """struct f16 { uint16_t bits; };
inline Vec vload(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m128i f16_bits(Vec a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void vstore(f16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), f16_bits(a)); }
inline Vec vround(const f16*, Vec a) { return _mm256_cvtph_ps(f16_bits(a)); }""",
    """struct f16 { uint16_t bits; };
inline Vec vload(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m256i f16_bits(Vec a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void vstore(f16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), f16_bits(a)); }
inline Vec vround(const f16*, Vec a) { return _mm512_cvtph_ps(f16_bits(a)); }""",
)

_DIVIDE = _isa(
    "inline Vec vdiv(Vec a, Vec b) { return _mm256_div_ps(a, b); }",
    "inline Vec vdiv(Vec a, Vec b) { return _mm512_div_ps(a, b); }",
)

# The second operand of max/min is returned when one is a NaN: callers pass the data there, so NaNs survive.
_MAX = _isa(
    "inline Vec vmax(Vec bound, Vec a) { return _mm256_max_ps(bound, a); }",
    "inline Vec vmax(Vec bound, Vec a) { return _mm512_max_ps(bound, a); }",
)

_NEGATE = _isa(
    "inline Vec vneg(Vec a) { return _mm256_xor_ps(a, vset(-0.0f)); }",
    "inline Vec vneg(Vec a) { return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), "
    "_mm512_set1_epi32(INT32_MIN))); }",
)


def _exp(prefix: str, rounding: str, scale: str) -> str:
    return f"""inline Vec vexp(Vec x) {{
  x = {prefix}_min_ps(vset(90.0f), {prefix}_max_ps(vset(-105.0f), x));  // beyond: inf and 0; a NaN passes
  Vec n = {prefix}_{rounding}_ps(vmul(x, vset(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  Vec r = vfma(n, vset(-0.693145751953125f), x);
  r = vfma(n, vset(-1.42860677e-06f), r);
  Vec p = vset(0.0013836834114044905f);  // minimax on |r| <= ln2/2, relative error 2e-9
  p = vfma(p, r, vset(0.008374822326004505f));
  p = vfma(p, r, vset(0.04166822507977486f));
  p = vfma(p, r, vset(0.16666419804096222f));
  p = vfma(p, r, vset(0.49999991059303284f));
  p = vfma(p, r, vset(1.0f));
  p = vfma(p, r, vset(1.0f));
{scale}
}}"""


_EXP = _isa(
    _exp(
        "_mm256",
        "round",
        """  // 2^n as 2^(n/2) * 2^(n - n/2): n may leave the range of one exponent
  __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  __m256i bias = _mm256_set1_epi32(127), rest = _mm256_sub_epi32(whole, half);
  p = vmul(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return vmul(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));""",
    ),
    _exp("_mm512", "roundscale", "  return _mm512_scalef_ps(p, n);"),
)

_SELECT = _isa(
    "inline Vec vselect_negative(Vec a, Vec if_negative, Vec otherwise) "
    "{ return _mm256_blendv_ps(otherwise, if_negative, a); }",
    "inline Vec vselect_negative(Vec a, Vec if_negative, Vec otherwise) "
    "{ return _mm512_mask_mov_ps(otherwise, _mm512_movepi32_mask(_mm512_castps_si512(a)), if_negative); }",
)

_ABS = _isa(
    "inline Vec vabs(Vec a) { return _mm256_andnot_ps(vset(-0.0f), a); }",
    "inline Vec vabs(Vec a) { return _mm512_abs_ps(a); }",
)

_CDF = """// erfc(z) = exp(-z^2) t P(t), t = 1 / (1 + z/2); relative error 3e-7
inline Vec vnormal_cdf(Vec x) {
  Vec z = vmul(vabs(x), vset(0.70710678f));
  Vec t = vdiv(vset(1.0f), vfma(z, vset(0.5f), vset(1.0f)));
  Vec p = vset(0.035767145454883575f);
  p = vfma(p, t, vset(-0.19103357195854187f));
  p = vfma(p, t, vset(0.3814200460910797f));
  p = vfma(p, t, vset(-0.2895923852920532f));
  p = vfma(p, t, vset(-0.021960007026791573f));
  p = vfma(p, t, vset(0.035405829548835754f));
  p = vfma(p, t, vset(0.05487794056534767f));
  p = vfma(p, t, vset(0.18559494614601135f));
  p = vfma(p, t, vset(0.2451791614294052f));
  p = vfma(p, t, vset(0.28225240111351013f));
  p = vfma(p, t, vset(0.2820885181427002f));
  Vec tail = vmul(vmul(vmul(p, t), vset(0.5f)), vexp(vneg(vmul(z, z))));
  return vselect_negative(x, tail, vadd(vset(1.0f), vneg(tail)));
}"""

_PARTIAL = """// The first n < kLanes elements; the other lanes read as 0.
template <class T>
inline Vec vload_first(const T* p, int64_t n) {
  T full[kLanes] = {};
  std::memcpy(full, p, n * sizeof(T));
  return vload(full);
}
template <class T>
inline void vstore_first(T* p, Vec a, int64_t n) {
  T full[kLanes];
  vstore(full, a);
  std::memcpy(p, full, n * sizeof(T));
}"""


def _same(text: str) -> dict[str, str]:
    return {"avx2": text, "avx512": text}


_NEEDS: dict[str, tuple[str, ...]] = {
    "exp": ("vector",),
    "cdf": ("vector", "abs", "divide", "negate", "exp", "select"),
}
_TEXTS: dict[str, dict[str, str]] = {
    "vector": _VECTOR,
    "sum": _SUM,
    "bfloat16": _BF16,
    "float16": _F16,
    "float32": _same("inline Vec vround(const float*, Vec a) { return a; }"),
    "divide": _DIVIDE,
    "max": _MAX,
    "negate": _NEGATE,
    "abs": _ABS,
    "select": _SELECT,
    "exp": _EXP,
    "cdf": _same(_CDF),
    "partial": _same(_PARTIAL),
}


def vector_text(isa: str, names: Iterable[str]) -> str:
    """The named snippets for one ISA with what they need, each once, in dependency order."""
    wanted = {"vector", *names}
    for name in tuple(wanted):
        wanted.update(_NEEDS.get(name, ()))
    return "\n\n".join(_TEXTS[name][isa] for name in _TEXTS if name in wanted)


_FILE = """// {title}
// Generated by Tilewright for {target}. {note}
#include <immintrin.h>
{includes}
#include "{header}"

namespace {{

{vector}

{body}

// The second name is the same kernel and carries an autograd formula.
const Registration registration(
    "{namespace}", run,
    {{"{op}{schema}",
     "{op}_train{schema}"}},
    {{"{op}", "{op}_train"}});

}}  // namespace
"""


def cpp_file(
    *,
    title: str,
    note: str,
    target: str,
    vector: str,
    body: str,
    op: str,
    schema: str,
    includes: Sequence[str] = (),
) -> str:
    """A whole source file: headers, snippets, the kernel's `run`, registration under `op` and `op_train`."""
    return _FILE.format(
        title=title,
        note=note,
        target=target,
        vector=vector,
        body=body,
        op=op,
        schema=schema,
        namespace=NAMESPACE,
        header=HEADER,
        includes="".join(f"\n#include <{name}>" for name in includes) + "\n" * bool(includes),
    )


def dtype_constant(dtype: str) -> str:
    """C++ expression for torch's number of a dtype."""
    return f"aoti_torch_dtype_{dtype}()"


def require(condition: str, message: str) -> str:
    """A run-time check of the arguments; raises a RuntimeError with the message."""
    return f'  require({condition}, "{message}");'
