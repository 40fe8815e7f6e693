"""C++ for block_sparse_attention, and for dense and causal attention by the same core."""

from __future__ import annotations

from typing import Any

from tilewright.compiler.block_layout import Kind
from tilewright.kernels.block_sparse_attention.cpp_core import (
    MASK_SPAN,
    ROWS,
    SOFTMAX,
    isa_text,
    pack_text,
    rules_text,
    tile_text,
)
from tilewright.kernels.block_sparse_attention.cpp_run import run_text
from tilewright.kernels.block_sparse_attention.signature import kinds_of, options_of, schema
from tilewright.kernels.common.cpp import ELEMENT, LANES, TRANSPOSE8, cpp_file, vector_text
from tilewright.runtime.contracts import KernelKey

KEYS = 128
"""Keys of a piece: its scores for ROW_CHUNK rows and one panel of V stay in L1."""
ROW_CHUNK = {"avx2": 24, "avx512": 48}
TILE_ROWS = {"avx2": 6, "avx512": 12}
"""Rows of the register tile: with two vectors of keys its sums fill 12 (24) of 16 (32) registers."""
TASK_ROWS = 256
SLACK = 8


def _head(key: KernelKey) -> str:
    config, arch = options_of(key), key.target.arch
    wide = 2 * LANES[arch]
    padded = -(-config["value"] // wide) * wide
    src = bool(config.get("src_q") or config.get("src_k"))
    fields = "  const T* data;\n  int64_t step;" + (
        "\n  const int32_t* src;  // nullptr: slots are tokens" if src else ""
    )
    place = "(x.src == nullptr ? slot : x.src[slot])" if src else "slot"
    return f"""using T = {ELEMENT[key.dtype]};
constexpr int64_t D = {config["head"]}, E = {config["value"]};
constexpr int64_t kNR = {wide}, kEP = {padded};  // kEP: E in whole panels
constexpr int64_t kKeys = {KEYS}, kRows = {ROW_CHUNK[arch]}, kQRows = {TASK_ROWS};
constexpr float kSlack = {SLACK};

// The rows of one head, `step` elements apart.
struct Heads {{
{fields}
}};
inline const T* at(const Heads& x, int64_t slot) {{ return x.data + {place} * x.step; }}
inline int64_t round_up(int64_t n) {{ return (n + kNR - 1) / kNR * kNR; }}
inline int64_t clip(int64_t x, int64_t most) {{ return x < 0 ? 0 : x > most ? most : x; }}"""


def _bounds(kinds: list[Kind], user: bool) -> tuple[str, str]:
    """(how the reach of a chunk of rows is found, how its scores are masked)."""
    spans = any(k not in (Kind.SLOT, Kind.USER) for k in kinds)
    tests = any(k in (Kind.SLOT, Kind.USER) for k in kinds)
    reach, mask = "", "        mask_span(s, from, to, 0, n, 0);"
    if spans:
        reach = """
      const Span a = span_of(c.rules, flag, q0 + r0, limit);
      const Span z = span_of(c.rules, flag, q0 + r0 + rc - 1, limit);
      const int64_t sink = clip(z.sink - base, n);
      lo = sink > 0 ? 0 : clip(a.lo - base, n);
      hi = clip(z.hi - base, n);
      if (sink > hi) hi = sink;
      if (lo >= hi) continue;
      whole = whole && ((z.lo <= base && a.hi >= base + n) || a.sink >= base + n);"""
        mask = """        const Span x = span_of(c.rules, flag, q0 + r0 + i, limit);
        mask_span(s, from, to, clip(x.lo - base, n), clip(x.hi - base, n), clip(x.sink - base, n));"""
    if tests and not spans:
        reach = "\n      whole = false;"
    elif tests:
        reach = f"\n      if (by_element(flag)) whole = false; else {{{reach}\n      }}"
    if spans:
        mask = (
            "        if (flag == 0) {\n          mask_span(s, from, to, 0, n, 0);\n        } else {\n"
            + mask
            + "\n        }"
        )
    if tests:
        data = "mask, c.mask_row, c.mask_column" if user else "nullptr, 0, 0"
        mask += f"""
        if (flag != 0 && by_element(flag))
          for (int64_t j = from; j < to; ++j)
            if (j >= n || !keeps(c.rules, flag, {data}, q0 + r0 + i, base + j))
              s[j] = -1e30f;"""
    if reach:
        reach = f"\n    if (flag != 0) {{{reach}\n    }}"
    return reach, mask


def _walk(key: KernelKey) -> str:
    kinds = kinds_of(key)
    reach, mask = _bounds(kinds, bool(options_of(key)["mask"]))
    more = ", int flag, const Call& c, int64_t limit, const uint8_t* mask" if kinds else ""
    return f"""struct Scratch {{
  float *q, *out, *scores, *m, *l, *alpha;
  static constexpr int64_t kFloats =
      (kQRows * (D + kEP + 1 + kLanes) + kRows * kKeys + kRows + 63) / 64 * 64;
  explicit Scratch(float* p) {{
    q = p;
    out = q + kQRows * D;
    scores = out + kQRows * kEP;
    l = scores + kRows * kKeys;
    m = l + kQRows * kLanes;
    alpha = m + kQRows;
  }}
}};

// Query slots q0 .. q0 + rows - 1 against the n keys from slot `base`, packed as `stride` keys at kp and vp.
inline void attend_piece(const Scratch& w, int64_t rows, int64_t q0, int64_t base, int64_t n, int64_t stride,
                         const float* kp, const float* vp{more}) {{
  for (int64_t r0 = 0; r0 < rows; r0 += kRows) {{
    const int64_t rc = rows - r0 < kRows ? rows - r0 : kRows;
    int64_t lo = 0, hi = n;
    bool whole = n % kNR == 0;{reach}
    const int64_t from = lo / kNR * kNR, to = round_up(hi);
    for (int64_t j = from; j < to; j += kNR)
      tiles<true>(rc, w.q + r0 * D, D, kp + j * D, D, w.scores + j, kKeys, nullptr);
    if (!whole) {{
      for (int64_t i = 0; i < rc; ++i) {{
        float* s = w.scores + i * kKeys;
{mask}
      }}
    }}
    for (int64_t i = 0; i < rc; ++i)
      w.alpha[i] = soften(w.scores + i * kKeys, from, to, w.m[r0 + i], w.l + (r0 + i) * kLanes);
    for (int64_t e = 0; e < kEP; e += kNR)
      tiles<false>(rc, w.scores + from, kKeys, vp + e * stride + from * kNR, to - from,
                   w.out + r0 * kEP + e, kEP, w.alpha);
  }}
}}"""


def generate(key: KernelKey, op: str) -> str:
    """The source for one configuration: head sizes, which layout arguments are present, which predicates."""
    config: dict[str, Any] = options_of(key)
    kinds = kinds_of(key)
    what = config["layout"] if config["layout"] != "blocks" else "block-sparse"
    parts = [
        isa_text(key.target.arch),
        _head(key),
        tile_text(TILE_ROWS[key.target.arch]),
        SOFTMAX,
        TRANSPOSE8,
        ROWS,
        pack_text(key.dtype == "float32", options_of(key)["value"], LANES[key.target.arch]),
        *([rules_text(kinds)] if kinds else []),
        MASK_SPAN,
        run_text(key, _walk(key)),
    ]
    return cpp_file(
        title=f"{what.capitalize()} attention, {key.dtype} heads of {config['head']} and {config['value']}.",
        note="Softmax and sums run in float32.",
        target=str(key.target),
        vector=vector_text(key.target.arch, {"sum", "max", "select", "partial", key.dtype}),
        body="\n\n".join(parts),
        op=op,
        schema=schema(key),
        includes=(
            "sys/mman.h",
            "algorithm",
            "atomic",
            "cmath",
            "cstdlib",
            "limits",
            "new",
            "thread",
            "vector",
        ),
    )
