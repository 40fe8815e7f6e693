"""C++ of quantized linear layers in chained decode functions: what each weight format needs."""

from __future__ import annotations

from tilewright.compiler.float_format import AnyFormat, FloatFormat
from tilewright.kernels.common.cpp import TRANSPOSE8
from tilewright.kernels.quantized_linear import cpp_float
from tilewright.kernels.quantized_linear.cpp_dot import dot
from tilewright.kernels.quantized_linear.cpp_parts import Shape, activations, geometry
from tilewright.kernels.quantized_linear.family import ACTIVATION_WORD

_PREPARE = """// Memory of one prepared row of x for K32 chunks of 32 columns, from `at` on.
inline Row row_at(float* at, int64_t K32) {{
  Row row;
  row.x = at;
{rest}
  return row;
}}

inline void prepare_row(const float* x, int64_t K, const Row& row{given}) {{
  const int64_t K32 = (K + 31) / 32;
  std::memcpy(row.x, x, K * sizeof(float));
  std::memset(row.x + K, 0, (K32 * 32 - K) * sizeof(float));
  prepare(row, K32{step});
}}"""

_MULTIPLY_BLOCKS = """// Rows [low, high) of a packed weight, low a multiple of 8, times a prepared row.
inline void multiply(const uint8_t* w, const float* bias, const Row& row, int64_t K32, int64_t low,
                     int64_t high, float* y) {
  const int64_t bytes = block_bytes(K32);
  const int64_t first = low / 8, last = (high + 7) / 8, quarter = (last - first) / 4;
  auto put = [&](int64_t block, Vec value) {
    const int64_t at = block * 8, left = high - at < 8 ? high - at : 8;
    if (bias != nullptr) value = vadd(value, load(bias + at, left));
    if (left == 8) vstore(y + at, value);
    else vstore_first(y + at, value, left);
  };
  for (int64_t i = first; i < first + quarter; ++i) {
    const uint8_t* start[4];
    for (int s = 0; s < 4; ++s) start[s] = w + (i + s * quarter) * bytes;
    Vec sum[4];
    dot_blocks<4>(start, row, K32, sum);
    for (int s = 0; s < 4; ++s) put(i + s * quarter, sum[s]);
  }
  for (int64_t i = first + 4 * quarter; i < last; ++i) {
    const uint8_t* start = w + i * bytes;
    Vec sum[1];
    dot_blocks<1>(&start, row, K32, sum);
    put(i, sum[0]);
  }
}"""

_MULTIPLY_ROWS = """// Rows [low, high) of a packed weight times a prepared row.
inline void multiply(const uint8_t* w, const float* bias, const Row& row, int64_t K32, int64_t low,
                     int64_t high, float* y) {
  const int64_t width = packed_width(K32), quarter = (high - low) / 4;
  auto put = [&](int64_t at, float value) { y[at] = bias == nullptr ? value : value + bias[at]; };
  float lane[1][8];
  for (int64_t i = low; i < low + quarter; ++i) {
    const uint8_t* start[4];
    for (int s = 0; s < 4; ++s) start[s] = w + (i + s * quarter) * width;
    dot<4, 1>(start, &row, K32, lane);
    for (int s = 0; s < 4; ++s) put(i + s * quarter, lane[0][s]);
  }
  for (int64_t i = low + 4 * quarter; i < high; ++i) {
    const uint8_t* start = w + i * width;
    dot<1, 1>(&start, &row, K32, lane);
    put(i, lane[0][0]);
  }
}"""


_INTEGER_ROW = """  row.scale = at + K32 * 32;
  row.mass = row.scale + groups_of(K32);
  row.shift = reinterpret_cast<int32_t*>(row.mass + groups_of(K32));
  row.q = reinterpret_cast<int8_t*>(row.shift + groups_of(K32));"""
_FLOAT_ROW = "  row.mass = at + K32 * 32;"
_CUT_ROW = "  row.scale = at + K32 * 32;"


def row_floats(form: AnyFormat, columns: int) -> int:
    """Floats that a prepared row of x takes."""
    chunks = -(-columns // 32)
    if isinstance(form, FloatFormat):
        return cpp_float.row_floats(form, chunks)
    return chunks * 40 + 3 * len(form.chunks(columns))


def format_text(form: AnyFormat, space: str, arch: str) -> str:
    """Row, row_at, prepare_row and multiply of one weight format, in a namespace of its own."""
    if isinstance(form, FloatFormat):
        rest = _CUT_ROW if form.activation != "none" else ""
        body: tuple[str, ...] = (
            *([TRANSPOSE8] if form.is_nvfp4 and arch == "avx512" else []),
            cpp_float.arithmetic(form, arch == "avx512"),
            _PREPARE.format(rest=rest, given="", step=""),
            _MULTIPLY_ROWS,
        )
    else:
        activation, wide = ACTIVATION_WORD[form.activation], form.grid == "wide"
        shape = Shape(form.bits, form.group, form.has_offset, activation, wide, avx512=arch == "avx512")
        rest = _INTEGER_ROW if shape.is_integer else _FLOAT_ROW
        parts = (geometry(shape), activations(shape), dot(shape))
        given, step = (", float step", ", step") if shape.is_static else ("", "")
        body = (*parts, _PREPARE.format(rest=rest, given=given, step=step), _MULTIPLY_BLOCKS)
    return "\n\n".join((f"namespace {space} {{", *body, f"}}  // namespace {space}"))
