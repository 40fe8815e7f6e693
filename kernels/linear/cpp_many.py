"""C++ for linear and linear_multi with any number of rows of x: oneDNN's product, by torch's C ABI.

torch multiplies float32 matrices with MKL, which runs its AVX2 code on processors of other makers. oneDNN
generates AVX-512 code for all of them and comes with torch. Weights are read where they are.
"""

from __future__ import annotations

from tilewright.kernels.common.cpp import cpp_file, dtype_constant, require
from tilewright.kernels.common.family import config_of
from tilewright.kernels.linear.cpp import names, schema
from tilewright.runtime.contracts import KernelKey

_PRODUCT = """extern "C" int32_t aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, const char*, const double**, int64_t, const char**,
    AtenTensorHandle*);

inline AtenTensorHandle handle(StableIValue argument) { return reinterpret_cast<AtenTensorHandle>(argument); }

// x W^T + b, on torch's threads; bias may be nullptr.
inline Tensor product(StableIValue x, StableIValue weight, AtenTensorHandle bias) {
  AtenTensorHandle made = nullptr;
  checked(aoti_torch_cpu__linear_pointwise(handle(x), handle(weight), bias == nullptr ? nullptr : &bias,
                                           "none", nullptr, 0, nullptr, &made));
  return Tensor(made);
}"""


def _run(key: KernelKey) -> str:
    pairs, dtype = names(key), dtype_constant(key.dtype)
    given = ["x", *[name for pair in pairs for name in pair if name is not None]]
    place = {name: f"stack[{i}]" for i, name in enumerate(given)}
    lines = [f"  Tensor {name}({place[name]});" for name in given]
    lines += [
        require(f"x.is_cpu({dtype})", f"x must be a {key.dtype} tensor on the CPU"),
        require("x.dim() >= 1 && x.sizes()[x.dim() - 1] > 0", "x must have columns"),
        "  const int64_t K = x.sizes()[x.dim() - 1];",
    ]
    for w, b in pairs:
        matrix = f"{w} must be a matrix with as many columns as x"
        lines.append(require(f"{w}.dim() == 2 && {w}.sizes()[1] == K", matrix))
        lines.append(f"  {w}.require_flat({dtype}, {w}.sizes()[0] * K);")
        lines += [] if b is None else [f"  {b}.require_flat({dtype}, {w}.sizes()[0]);"]
    for i, (w, b) in enumerate(pairs):
        bias = "nullptr" if b is None else f"handle({place[b]})"
        lines.append(f"  Tensor y{i} = product({place['x']}, {place[w]}, {bias});")
    lines += [f"  stack[{i}] = y{i}.release();" for i in range(config_of(key)["count"])]
    body = "\n".join(lines)
    return f"""void run(StableIValue* stack, uint64_t, uint64_t) {{
{body}
}}"""


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration: number of weights, which have biases."""
    count = config_of(key)["count"]
    return cpp_file(
        title=f"x W^T for any number of rows of x: {count} weight{'s' if count > 1 else ''}.",
        note="The product is oneDNN's.",
        target=str(key.target),
        vector="",
        body="\n\n".join((_PRODUCT, _run(key))),
        op=op,
        schema=schema(key),
    )
