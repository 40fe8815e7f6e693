"""C++ that the kernels of quantized_linear share: where codes lie, how a row of x is made ready.

Arithmetic. Unsigned codes of at most 4 bits times activations in -127..127 (vpmaddubsw) sum eight products
in 16 bits without overflow: 8 * 2 * 15 * 127 = 30480. 8-bit codes take |w| and the activation with the sign
of w: 2 * 128 * 127 = 32512 fits, and every pair is widened to 32 bits at once. Both are exact. What the code
of zero and an offset add is a multiple of the sum of the group's activations, which is kept beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.compiler.weight_format import CHUNK
from tilewright.kernels.common.family import config_of
from tilewright.runtime.contracts import KernelKey

STREAMS = 4
"""Blocks of 8 rows, far apart, that a thread reads side by side."""
AHEAD_BYTES = 1152
"""Prefetch distance in each stream."""


@dataclass(frozen=True)
class Shape:
    """What specialises a kernel, read from a key."""

    bits: int
    group: int
    offset: bool
    activation: str
    """`none`, `token`, `token4`, `group` or `static`."""
    wide: bool
    """Scales of groups are float32, not float16."""
    avx512: bool = False
    """Vectors of 512 bits; integer products by VNNI, which takes all codes as unsigned."""

    @property
    def short_grids(self) -> bool:
        """Scales and offsets are float16."""
        return self.group != 0 and not self.wide

    @property
    def middle(self) -> int:
        """The code of zero, 0 with an offset."""
        return 0 if self.offset else 1 << (self.bits - 1)

    @property
    def by_token(self) -> bool:
        """Every row of x has a scale of its own."""
        return self.activation in ("token", "token4")

    @property
    def is_static(self) -> bool:
        """The packed weight holds the step of the activations."""
        return self.activation == "static"

    @property
    def largest(self) -> int:
        """The largest code of an activation."""
        return 7 if self.activation == "token4" else 127

    @property
    def is_integer(self) -> bool:
        return self.activation != "none"


def shape_of(key: KernelKey) -> Shape:
    """The specialising options of a key."""
    config = config_of(key)
    bits, group, offset, activation = (config[name] for name in ("bits", "group", "offset", "activation"))
    return Shape(bits, group, offset, activation, config["wide"], key.target.arch == "avx512")


def geometry(shape: Shape) -> str:
    """Where codes, scales and offsets of a block of 8 rows lie."""
    half = shape.short_grids
    load = (
        "_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))"
        if half
        else "_mm256_loadu_ps(reinterpret_cast<const float*>(p))"
    )
    count = "1" if shape.group == 0 else "(K32 + kGroup - 1) / kGroup"
    codes = "" if shape.avx512 and not shape.is_integer else f"\n{_codes(shape.bits)}"
    chunks = "K32" if shape.group == 0 else f"(K32 - first < {shape.group // CHUNK} ? K32 - first : kGroup)"
    return f"""using Int = __m256i;
constexpr int kBits = {shape.bits};
constexpr int64_t kGroup = {shape.group // CHUNK};  // chunks of 32 columns with one scale; 0: a whole row
constexpr int64_t kChunkBytes = 32 * kBits;
constexpr int64_t kGridBytes = {16 if half else 32};  // 8 scales, or 8 offsets
constexpr int64_t kTailBytes = {"2 * " * shape.offset}kGridBytes;

inline Int iload(const void* p) {{ return _mm256_loadu_si256(static_cast<const Int*>(p)); }}
inline Vec grid(const uint8_t* p) {{ return {load}; }}
inline int64_t groups_of(int64_t K32) {{ return {count}; }}
inline int64_t chunks_of(int64_t first, int64_t K32) {{ return {chunks}; }}
inline int64_t block_bytes(int64_t K32) {{ return K32 * kChunkBytes + groups_of(K32) * kTailBytes; }}
inline int64_t packed_width(int64_t K32) {{ return block_bytes(K32); }}
inline int64_t packed_rows(int64_t rows) {{ return (rows + 7) / 8{" + 1" * shape.is_static}; }}
{_STEP * shape.is_static}{codes}"""


_STEP = """
// The step of the activations, behind the blocks of a packed weight.
inline float step_of(const uint8_t* data, int64_t rows, int64_t K32) {
  float step;
  std::memcpy(&step, data + (rows + 7) / 8 * block_bytes(K32), sizeof step);
  return step;
}
"""


def _codes(bits: int) -> str:
    """codes<j>(p): vector j of a chunk, byte r*4 + b for row r and column 4j + b."""
    if bits == 8:
        body, note = "  return iload(p + 32 * j);", "signed"
    elif bits == 4:
        body = """  Int pair = iload(p + 32 * (j / 2));
  return _mm256_and_si256(j % 2 ? _mm256_srli_epi16(pair, 4) : pair, _mm256_set1_epi8(15));"""
        note = "0..15"
    else:
        body = """  Int four = iload(p + 32 * (j / 4));
  Int low = _mm256_and_si256(_mm256_srli_epi16(four, 2 * (j % 4)), _mm256_set1_epi8(3));"""
        body += (
            """
  Int third = iload(p + 64);
  third = j < 2 ? _mm256_slli_epi16(third, j < 2 ? 2 - j : 0) : _mm256_srli_epi16(third, j < 2 ? 0 : j - 2);
  return _mm256_or_si256(low, _mm256_and_si256(third, _mm256_set1_epi8(4)));"""
            if bits == 3
            else "\n  return low;"
        )
        note = "0..7" if bits == 3 else "0..3"
    return f"""// Vector j of a chunk: byte r * 4 + b is the code of row r, column 4 j + b; {note}.
template <int j>
inline Int codes(const uint8_t* p) {{
{body}
}}"""


_PLAIN_ROW = """// A row of x, padded with zeros to whole chunks, and what every group of it adds.
struct Row {
  float* x;     // [32 * K32]
  float* mass;  // [groups]: sum of x, for the offsets
};

NOTEinline void prepare(const Row& row, int64_t K32) {
  for (int64_t g = 0, c = 0; g < groups_of(K32); ++g) {
    Vec sum = vset(0.0f);
    for (int64_t last = c + chunks_of(c, K32); c < last; ++c)
      for (int u = 0; u < 4; ++u) {
        float* p = row.x + c * 32 + u * 8;
        Vec a = vload(p);
        sum = vadd(sum, a);STORE
      }
    row.mass[g] = vsum(sum);
  }
}"""

_PLACED_NOTE = "// Columns 1 and 3 of four are divided by 256, where their codes lie in a word.\n"
_PLACED = """
        vstore(p, vmul(a, _mm256_setr_ps(1, 1 / 256.f, 1, 1 / 256.f, 1, 1 / 256.f, 1, 1 / 256.f)));"""


def range_text(largest: int) -> str:
    """`range`: what activations are scaled by so that the largest becomes the largest code."""
    return f"""// The scale of some chunks and its inverse; a NaN or an infinity makes the scale a NaN.
inline float range(const float* x, int64_t chunks, float* inverse) {{
  Vec largest = vset(0.0f), bad = vset(0.0f);
  for (int64_t i = 0; i < chunks * 4; ++i) {{
    Vec a = vload(x + i * 8);
    largest = vmax(largest, vabs(a));
    bad = vfma(a, vset(0.0f), bad);
  }}
  alignas(32) float lane[8];
  vstore(lane, largest);
  float most = lane[0];
  for (int i = 1; i < 8; ++i) most = lane[i] > most ? lane[i] : most;
  *inverse = most > 2e-36f ? {largest}.0f / most : 0.0f;
  return most * (1.0f / {largest}.0f) + vsum(bad);
}}
"""


_CUT = """// 0 for a row of numbers; a NaN where there is a NaN or an infinity.
inline float poison(const float* x, int64_t chunks) {
  Vec bad = vset(0.0f);
  for (int64_t i = 0; i < chunks * 4; ++i) bad = vfma(vload(x + i * 8), vset(0.0f), bad);
  return vsum(bad);
}

inline Vec cut(Vec a) { return _mm256_min_ps(vmax(vset(-127.0f), a), vset(127.0f)); }
"""

_QUANTIZED_ROW = """// A row of x, padded with zeros to whole chunks, its codes and what every group adds.
struct Row {
  float* x;        // [32 * K32]
  float* scale;    // [groups]: of the activations
  float* mass;     // [groups]: scaled sum of the codes, for the offsets
  int8_t* q;       // [32 * K32]
  int32_t* shift;  // [groups]: what the code of zero adds
};

RANGE
inline int32_t quantize_chunk(const float* x, int8_t* q, float inverse) {  // returns the sum
  Int part[4];
  for (int u = 0; u < 4; ++u) part[u] = _mm256_cvtps_epi32(SCALED);
  Int sum = _mm256_add_epi32(_mm256_add_epi32(part[0], part[1]), _mm256_add_epi32(part[2], part[3]));
  Int bytes = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<Int*>(q), bytes);
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}

inline void prepare(const Row& row, int64_t K32GIVEN) {
ONCE  for (int64_t g = 0, c = 0; g < groups_of(K32); ++g) {
    row.scale[g] = SCALE;
    int32_t total = 0;
    for (int64_t last = c + chunks_of(c, K32); c < last; ++c)
      total += quantize_chunk(row.x + c * 32, row.q + c * 32, inverse);
    row.shift[g] = SHIFT;
    row.mass[g] = row.scale[g] * total;
  }
}"""


def activations(shape: Shape) -> str:
    """One row of x made ready: padded to whole chunks, quantized, with what each group adds."""
    if not shape.is_integer:
        note, store = ("", "") if shape.avx512 else (_PLACED_NOTE, _PLACED)
        return _PLAIN_ROW.replace("NOTE", note).replace("STORE", store)
    signed = shape.bits == 8 and not shape.avx512
    middle = shape.middle - (128 if signed else 0)
    shift = f"{middle} * total" if middle else "0"
    scale, scaled, given = "scale", "vmul(vload(x + u * 8), vset(inverse))", ""
    if shape.is_static:
        once = "  const float inverse = 1.0f / step, scale = step + poison(row.x, K32);\n"
        scaled, given = f"cut({scaled})", ", float step"
    elif shape.by_token:
        once = "  float inverse;\n  const float scale = range(row.x, K32, &inverse);\n"
    else:
        once, scale = "  float inverse;\n", "range(row.x + c * 32, chunks_of(c, K32), &inverse)"
    text = _QUANTIZED_ROW.replace("RANGE", _CUT if shape.is_static else range_text(shape.largest))
    text = text.replace("ONCE", once).replace("SCALED", scaled).replace("GIVEN", given)
    return text.replace("SCALE", scale).replace("SHIFT", shift)
