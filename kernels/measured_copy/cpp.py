"""C++ for measured_copy: runs of elements, each copied and summed; the sums of runs are added in double."""

from __future__ import annotations

from tilewright.kernels.common.cpp import ELEMENT, cpp_file, dtype_constant, require, vector_text
from tilewright.runtime.contracts import KernelKey

SCHEMA = "(Tensor x, Tensor before, Tensor(a!) into) -> Tensor"

_TEXT = """using T = @ELEMENT@;
constexpr int64_t kRun = 4096, kStep = 4 * kLanes;
static_assert(kRun % kStep == 0);

// Sums of |x - before| and |before| over n elements of a run, which are copied.
inline void measure(const T* x, const T* before, T* to, int64_t n, double* sums) {
  Vec far[4], size[4];
  for (int i = 0; i < 4; ++i) far[i] = size[i] = vset(0.0f);
  auto take = [&](int i, Vec a, Vec b) {
    far[i] = vadd(far[i], vabs(vadd(a, vneg(b))));
    size[i] = vadd(size[i], vabs(b));
  };
  int64_t at = 0;
  for (; at + kStep <= n; at += kStep)
    for (int i = 0; i < 4; ++i) take(i, vload(x + at + i * kLanes), vload(before + at + i * kLanes));
  for (; at < n; at += kLanes) {
    const int64_t left = n - at < kLanes ? n - at : kLanes;
    take(0, vload_first(x + at, left), vload_first(before + at, left));
  }
  std::memcpy(to, x, n * sizeof(T));
  sums[0] = vsum(vadd(vadd(far[0], far[1]), vadd(far[2], far[3])));
  sums[1] = vsum(vadd(vadd(size[0], size[1]), vadd(size[2], size[3])));
}

void run(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x(stack[0]), before(stack[1]), into(stack[2]);
@CHECKS@
  x.make_contiguous(@DTYPE@);
  before.make_contiguous(@DTYPE@);
  into.require_flat(@DTYPE@, x.numel());
  const int64_t batch = x.sizes()[0], n = batch > 0 ? x.numel() / batch : 0, runs = (n + kRun - 1) / kRun;
  const int64_t sizes[2] = {2, batch};
  Tensor sums(sizes, 2, @FLOAT32@);
  const T *from = x.data<T>(), *old = before.data<T>();
  T* to = into.mutable_data<T>();
  double few[2 * 64];
  std::unique_ptr<double[]> many(batch * runs > 64 ? new double[2 * batch * runs] : nullptr);
  double* each = many ? many.get() : few;
  parallel_for(0, batch * runs, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % runs * kRun, at = i / runs * n + first;
      measure(from + at, old + at, to + at, n - first < kRun ? n - first : kRun, each + 2 * i);
    }
  });
  for (int64_t b = 0; b < batch; ++b) {
    double far = 0, size = 0;
    for (int64_t i = b * runs; i < (b + 1) * runs; ++i) {
      far += each[2 * i];
      size += each[2 * i + 1];
    }
    sums.mutable_data<float>()[b] = static_cast<float>(far);
    sums.mutable_data<float>()[batch + b] = static_cast<float>(size);
  }
  stack[0] = sums.release();
}"""


def generate(key: KernelKey, op: str) -> str:
    """The source for one configuration."""
    dtype = dtype_constant(key.dtype)
    checks = require(
        f"x.is_cpu({dtype}) && before.is_cpu({dtype}) && x.dim() > 0 && x.has_shape_of(before) && "
        "x.has_shape_of(into)",
        f"x, before and into must be {key.dtype} of one shape [B, ...]",
    )
    words = {"ELEMENT": ELEMENT[key.dtype], "CHECKS": checks, "DTYPE": dtype}
    text = _TEXT
    for name, word in (words | {"FLOAT32": dtype_constant("float32")}).items():
        text = text.replace(f"@{name}@", word)
    return cpp_file(
        title=f"A copy of {key.dtype} elements, and their L1 distance from what was kept before.",
        note="Runs are summed in float32, sums of runs in double.",
        target=str(key.target),
        vector=vector_text(key.target.arch, {key.dtype, "sum", "abs", "negate", "partial"}),
        body=text,
        op=op,
        schema=SCHEMA,
        includes=("memory",),
    )
