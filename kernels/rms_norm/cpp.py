"""C++ for rms_norm and add_rms_norm: two passes over a row that stays in L1, rows shared among threads."""

from __future__ import annotations

from tilewright.kernels.common.cpp import ELEMENT, SCALAR_TYPE, check, cpp_file, vector_text
from tilewright.kernels.common.family import config_of
from tilewright.runtime.contracts import KernelKey

GRAIN = 16384
"""Elements a thread must get before a second one is woken."""


def schema(key: KernelKey) -> str:
    """The kernel op's schema: what is off has no argument."""
    config = config_of(key)
    inputs = ["Tensor x"]
    if config["residual"]:
        inputs.append("Tensor residual")
    if config["weight"] != "none":
        inputs.append("Tensor weight")
    inputs.append("float eps")
    if config["offset"]:
        inputs.append("float offset")
    return f"({', '.join(inputs)}) -> {'(Tensor, Tensor)' if config['residual'] else 'Tensor'}"


def _row_function(key: KernelKey) -> str:
    """`norm_row`: one row of D elements."""
    config = config_of(key)
    residual, weight = config["residual"], config["weight"]
    scaled, shifted, last = weight != "none", config["offset"], config["rounding"] == "scale_last"
    params = ["const X* x"]
    params += ["const X* residual", "X* total"] if residual else []
    params += ["const W* weight"] if scaled else []
    params += ["Y* y", "int64_t D", "float eps"] + (["Vec offset"] if shifted else [])

    def square(load: str, store: str) -> str:
        if not residual:
            return f"Vec v = {load.format('x')};"
        add = f"vadd({load.format('residual')}, {load.format('x')})"
        return f"Vec v = vround(x, {add});\n    {store.format('total', 'v')};"

    def scale(load: str) -> list[str]:
        lines = [f"Vec v = vmul({load.format('total' if residual else 'x')}, rstd);"]
        if not scaled:
            return lines
        if last:
            lines.append("v = vround(x, v);")
        lines.append(f"Vec w = {load.format('weight')};")
        if shifted:
            lines.append("w = vround(weight, vadd(w, offset));" if last else "w = vadd(w, offset);")
        lines.append("v = vmul(v, w);")
        return lines

    full, part = "vload({} + i)", "vload_first({} + i, D - i)"
    store, store_part = "vstore({} + i, {})", "vstore_first({} + i, {}, D - i)"
    unrolled, store_unrolled = "vload({} + i + u * kLanes)", "vstore({} + i + u * kLanes, {})"
    body = "\n    ".join(scale(full))
    tail = "\n    ".join(scale(part))
    return f"""inline void norm_row({", ".join(params)}) {{
  Vec sums[4] = {{vset(0.0f), vset(0.0f), vset(0.0f), vset(0.0f)}};
  int64_t i = 0;
  for (; i + 4 * kLanes <= D; i += 4 * kLanes) {{
    for (int u = 0; u < 4; ++u) {{
      {square(unrolled, store_unrolled)}
      sums[u] = vfma(v, v, sums[u]);
    }}
  }}
  for (; i + kLanes <= D; i += kLanes) {{
    {square(full, store)}
    sums[0] = vfma(v, v, sums[0]);
  }}
  if (i < D) {{
    {square(part, store_part)}
    sums[1] = vfma(v, v, sums[1]);
  }}
  float sum = vsum(vadd(vadd(sums[0], sums[1]), vadd(sums[2], sums[3])));
  Vec rstd = vset(1.0f / std::sqrt(sum / static_cast<float>(D) + eps));
  for (i = 0; i + kLanes <= D; i += kLanes) {{
    {body}
    {store.format("y", "v")};
  }}
  if (i < D) {{
    {tail}
    {store_part.format("y", "v")};
  }}
}}"""


def _run(key: KernelKey) -> str:
    config = config_of(key)
    residual, weight, shifted = config["residual"], config["weight"], config["offset"]
    params = ["Tensor x"] + (["Tensor residual"] if residual else [])
    params += (
        (["Tensor weight"] if weight != "none" else [])
        + ["double eps"]
        + (["double offset"] if shifted else [])
    )
    lines = [check("x.is_cpu() && x.dim() >= 1", "x must be a CPU tensor with at least one axis")]
    lines.append(check(f"x.scalar_type() == ScalarType::{SCALAR_TYPE[key.dtype]}", f"x must be {key.dtype}"))
    lines += ["  x = contiguous(x);  // no copy when it is", "  const int64_t D = x.size(-1);"]
    call = ["x_data + r * D"]
    after = ["  const X* x_data = static_cast<const X*>(x.const_data_ptr());"]
    if residual:
        same = (
            "std::equal(x.sizes().begin(), x.sizes().end(), residual.sizes().begin(), residual.sizes().end())"
        )
        lines.append(check(f"residual.is_cpu() && {same}", "residual must have the shape of x"))
        lines.append(check("residual.scalar_type() == x.scalar_type()", "residual must have the dtype of x"))
        lines += ["  residual = contiguous(residual);", "  Tensor total = new_empty(x, x.sizes());"]
        after.append("  const X* residual_data = static_cast<const X*>(residual.const_data_ptr());")
        after.append("  X* total_data = static_cast<X*>(total.mutable_data_ptr());")
        call += ["residual_data + r * D", "total_data + r * D"]
    if weight != "none":
        lines.append(
            check(
                "weight.is_cpu() && weight.dim() == 1 && weight.size(0) == D",
                "weight must have the size of x's last axis",
            )
        )
        lines.append(
            check(f"weight.scalar_type() == ScalarType::{SCALAR_TYPE[weight]}", f"weight must be {weight}")
        )
        lines.append("  weight = contiguous(weight);")
        after.append("  const W* weight_data = static_cast<const W*>(weight.const_data_ptr());")
        call.append("weight_data")
    lines.append(f"  Tensor y = new_empty(x, x.sizes(), ScalarType::{SCALAR_TYPE[config['out']]});")
    after.append("  Y* y_data = static_cast<Y*>(y.mutable_data_ptr());")
    call += ["y_data + r * D", "D", "static_cast<float>(eps)"]
    call += ["vset(static_cast<float>(offset))"] if shifted else []
    result = "{y, total}" if residual else "y"
    kind = "std::tuple<Tensor, Tensor>" if residual else "Tensor"
    checks, setup = "\n".join(lines), "\n".join(after)
    return f"""{kind} run({", ".join(params)}) {{
{checks}
  if (x.numel() == 0) return {result};
{setup}
  const int64_t rows = x.numel() / D, grain = std::max<int64_t>(1, {GRAIN} / D);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {{
    for (int64_t r = first; r < last; ++r) {{
      norm_row({", ".join(call)});
    }}
  }});
  return {result};
}}"""


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration: residual, weight dtype, output dtype, rounding, offset."""
    config = config_of(key)
    types = [f"using X = {ELEMENT[key.dtype]};  // x{' and residual' if config['residual'] else ''}"]
    if config["weight"] != "none":
        types.append(f"using W = {ELEMENT[config['weight']]};  // weight")
    types.append(f"using Y = {ELEMENT[config['out']]};  // result")
    elements = {key.dtype, config["out"]} | ({config["weight"]} - {"none"})
    what = "rms_norm(residual + x), residual + x" if config["residual"] else "rms_norm(x)"
    return cpp_file(
        title=f"{what} over the last axis, statistics in float32.",
        note="Inputs that are not contiguous are copied first.",
        target=str(key.target),
        vector=vector_text(key.target.arch, {"sum", "partial", *elements}),
        body="\n\n".join(("\n".join(types), _row_function(key), _run(key))),
        op=op,
        schema=schema(key),
    )
