"""C++ of packed rows: codes of 8 or 4 bits with a scale and offset a group, read into vectors and written."""

from __future__ import annotations

from tilewright.kernels.common.family import config_of
from tilewright.kernels.paged.cpp_core import PLAIN_ROWS, RowFormat
from tilewright.kernels.paged.signature import is_packed
from tilewright.runtime.contracts import KernelKey

_CODES = {
    8: {
        "avx2": """inline Vec vcodes(const uint8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}""",
        "avx512": """inline Vec vcodes(const uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}""",
    },
    4: {
        "avx2": """// The low halves of kLanes bytes, or with shift = 4 the high ones.
inline Vec vcodes(const uint8_t* from, int shift) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m256i low = _mm256_srl_epi32(bytes, _mm_cvtsi32_si128(shift));
  return _mm256_cvtepi32_ps(_mm256_and_si256(low, _mm256_set1_epi32(15)));
}""",
        "avx512": """// The low halves of kLanes bytes, or with shift = 4 the high ones.
inline Vec vcodes(const uint8_t* from, int shift) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m512i low = _mm512_srl_epi32(bytes, _mm_cvtsi32_si128(shift));
  return _mm512_cvtepi32_ps(_mm512_and_si512(low, _mm512_set1_epi32(15)));
}""",
    },
}

_UNPACK = """// Channels d .. d + kLanes - 1 of a row of kSize channels in groups of kGroup.
template <int64_t kSize, int64_t kGroup>
inline __attribute__((always_inline)) Vec vunpack(const uint8_t* row, int64_t d) {
  const int64_t g = d / kGroup;
  float numbers[2];
  std::memcpy(numbers, row + kSize * kBits / 8 + g * 8, sizeof numbers);
@WHERE@
  return vfma(vset(numbers[0]), codes, vset(numbers[1]));
}"""
_WHERE = {
    8: "  const Vec codes = vcodes(row + d);",
    4: """  const int64_t in = d % kGroup, high = in >= kGroup / 2;
  const Vec codes = vcodes(row + (g - high) * (kGroup / 2) + in, high ? 4 : 0);""",
}

_NARROW = {
    "avx2": """// round(x / scale) + zero within 0 .. kLevels, as bytes.
inline void vencode(uint8_t* to, Vec x, Vec scale, __m256i zero) {
  __m256i code = _mm256_add_epi32(_mm256_cvtps_epi32(vdiv(x, scale)), zero);
  code = _mm256_min_epi32(_mm256_max_epi32(code, _mm256_setzero_si256()), _mm256_set1_epi32(kLevels));
  const __m128i pairs = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(pairs, pairs));
}
inline __m256i vwhole(int32_t a) { return _mm256_set1_epi32(a); }""",
    "avx512": """// round(x / scale) + zero within 0 .. kLevels, as bytes.
inline void vencode(uint8_t* to, Vec x, Vec scale, __m512i zero) {
  __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(vdiv(x, scale)), zero);
  code = _mm512_min_epi32(_mm512_max_epi32(code, _mm512_setzero_si512()), _mm512_set1_epi32(kLevels));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(code));
}
inline __m512i vwhole(int32_t a) { return _mm512_set1_epi32(a); }""",
}

_LEVELS = "constexpr int32_t kLevels = (1 << kBits) - 1;"
_PACK = """// A row of kSize channels as codes and numbers. The range of a group holds
// zero, which is a code; what is not finite leaves no offset.
template <int64_t kSize, int64_t kGroup>
inline void pack(uint8_t* row, const T* x) {
  for (int64_t g = 0; g < kSize / kGroup; ++g, x += kGroup) {
    Vec lows = vset(0.0f), highs = lows;
    for (int64_t d = 0; d < kGroup; d += kLanes) {
      lows = vleast(lows, vload(x + d));
      highs = vmost(highs, vload(x + d));
    }
    float least[kLanes], most[kLanes], low = 0, high = 0, bad = 0;
    vstore(least, lows);
    vstore(most, highs);
    for (int64_t i = 0; i < kLanes; ++i) {
      low = least[i] < low ? least[i] : low;
      high = most[i] > high ? most[i] : high;
      bad += least[i] * 0.0f + most[i] * 0.0f;
    }
    const float step = (high - low) / kLevels, scale = step > 0 ? step : 1.0f;
    const float zero = std::nearbyint(-low / scale), offset = bad == 0 ? -scale * zero : bad;
    const int32_t shift = offset == offset ? static_cast<int32_t>(zero) : 0;
    uint8_t codes[kGroup];
    for (int64_t d = 0; d < kGroup; d += kLanes)
      vencode(codes + d, vload(x + d), vset(scale), vwhole(shift));
    constexpr int64_t bytes = kGroup * kBits / 8;
    if constexpr (kBits == 4) {
      for (int64_t i = 0; i < bytes; ++i) codes[i] |= codes[i + bytes] << 4;
    }
    std::memcpy(row + g * bytes, codes, bytes);
    const float numbers[2] = {scale, offset};
    std::memcpy(row + kSize * kBits / 8 + g * 8, numbers, sizeof numbers);
  }
}"""

KEEP_PACKED = {
    "@KEEP_KEY@": "pack<D, kKeyGroup>(kp, kr)",
    "@KEEP_VALUE@": "pack<E, kValueGroup>(vp, vr)",
}
"""How an append stores a row."""


def constants_text(key: KernelKey) -> str:
    """What a pool of packed rows adds to the constants of a configuration."""
    if not is_packed(key):
        return ""
    config = config_of(key)
    bits, group = config["bits"], config["group"]
    k_group, v_group = group or config["head"], group or config["value"]
    return f"""
constexpr int64_t kBits = {bits}, kKeyGroup = {k_group}, kValueGroup = {v_group};
constexpr int64_t kKeyBytes = D * kBits / 8 + D / kKeyGroup * 8;
constexpr int64_t kValueBytes = E * kBits / 8 + E / kValueGroup * 8;"""


def pages_text(key: KernelKey) -> str:
    """What a title says of the pages."""
    rows = f" with rows of {config_of(key)['bits']} bits" if is_packed(key) else ""
    return f"pages of {config_of(key)['page']}{rows}"


def row_format(key: KernelKey) -> RowFormat:
    """How the rows of a configuration are read."""
    if not is_packed(key):
        return PLAIN_ROWS
    bits, arch = config_of(key)["bits"], key.target.arch
    return RowFormat(
        element="uint8_t",
        key="vunpack<D, kKeyGroup>(b[j], d)",
        value="vunpack<E, kValueGroup>(v[j], e + w * kLanes)",
        ahead_key="prefetch<kKeyBytes>(ahead[j])",
        ahead_value="prefetch<kValueBytes * W * kLanes / E>(ahead[j] + kValueBytes * e / E)",
        helpers=f"{_CODES[bits][arch]}\n\n{_UNPACK.replace('@WHERE@', _WHERE[bits])}",
    )


def pack_text(arch: str) -> str:
    """`pack`: a row of the model's dtype to a packed one; it needs vleast and vmost."""
    return "\n\n".join([_LEVELS, _NARROW[arch], _PACK])
