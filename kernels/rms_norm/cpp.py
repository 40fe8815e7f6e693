"""C++ for rms_norm and add_rms_norm: two passes over a row that stays in L1, rows shared among threads."""

from __future__ import annotations

from tilewright.kernels.common.cpp import ELEMENT, cpp_file, dtype_constant, require, vector_text
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
  Vec rstd = vset(1.0f / __builtin_sqrtf(sum / static_cast<float>(D) + eps));
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
    residual, weight = config["residual"], config["weight"]
    x_dtype = dtype_constant(key.dtype)
    names = ["x", *(["residual"] if residual else []), *(["weight"] if weight != "none" else [])]
    steals = "\n".join(f"  Tensor {name}(stack[{i}]);" for i, name in enumerate(names))
    scalars = f"  const float eps = static_cast<float>(to_double(stack[{len(names)}]));"
    if config["offset"]:
        scalars += f"\n  const Vec offset = vset(static_cast<float>(to_double(stack[{len(names) + 1}])));"
    lines = [
        require(f"x.is_cpu({x_dtype})", f"x must be a {key.dtype} tensor on the CPU"),
        require("x.dim() >= 1", "x must have an axis"),
        f"  x.make_contiguous({x_dtype});",
        "  const int64_t D = x.sizes()[x.dim() - 1];",
    ]
    call = ["x_data + r * D"]
    pointers = ["  const X* x_data = x.data<X>();"]
    if residual:
        lines += [
            require(
                f"residual.is_cpu({x_dtype}) && residual.has_shape_of(x)",
                "residual must have the shape, dtype and device of x",
            ),
            f"  residual.make_contiguous({x_dtype});",
            f"  Tensor total(x.sizes(), x.dim(), {x_dtype});",
        ]
        pointers += [
            "  const X* residual_data = residual.data<X>();",
            "  X* total_data = total.mutable_data<X>();",
        ]
        call += ["residual_data + r * D", "total_data + r * D"]
    if weight != "none":
        lines += [
            require(
                f"weight.is_cpu({dtype_constant(weight)}) && weight.dim() == 1 && weight.sizes()[0] == D",
                f"weight must be a {weight} tensor on the CPU with the size of x's last axis",
            ),
            f"  weight.make_contiguous({dtype_constant(weight)});",
        ]
        pointers.append("  const W* weight_data = weight.data<W>();")
        call.append("weight_data")
    lines.append(f"  Tensor y(x.sizes(), x.dim(), {dtype_constant(config['out'])});")
    pointers.append("  Y* y_data = y.mutable_data<Y>();")
    call += ["y_data + r * D", "D", "eps"] + (["offset"] if config["offset"] else [])
    outputs = "\n".join(
        f"  stack[{i}] = {name}.release();" for i, name in enumerate(["y"] + (["total"] if residual else []))
    )
    checks, setup = "\n".join(lines), "\n".join(pointers)
    return f"""void run(StableIValue* stack, uint64_t, uint64_t) {{
{steals}
{scalars}
{checks}
{setup}
  const int64_t rows = D > 0 ? x.numel() / D : 0, grain = D < {GRAIN} ? {GRAIN} / (D + 1) + 1 : 1;
  parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {{
    for (int64_t r = first; r < last; ++r) {{
      norm_row({", ".join(call)});
    }}
  }});
{outputs}
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
