"""C++ of one call: arguments and their checks, one task, and the whole `run`."""

from __future__ import annotations

from tilewright.kernels.block_sparse_attention.cpp_core import CHECKS, DENSE_TABLES
from tilewright.kernels.block_sparse_attention.cpp_jobs import LEASE, STRUCTS, jobs_text
from tilewright.kernels.block_sparse_attention.signature import (
    INDICES,
    kinds_of,
    options_of,
    rule_names,
    tensor_names,
)
from tilewright.kernels.common.cpp import dtype_constant, require
from tilewright.runtime.contracts import KernelKey


def _call(key: KernelKey) -> str:
    config = options_of(key)
    fields = ["float scale;", "Table row_ptr, col;"]
    if config["flag"]:
        fields.append("Table flag;")
    if kinds_of(key):
        fields.append("const Rule* rules;")
    if config["mask"]:
        fields.append("int64_t mask_row, mask_column;")
    body = "\n  ".join(fields)
    return f"struct Call {{\n  {body}\n}};"


def _attend(key: KernelKey) -> str:
    config, kinds = options_of(key), kinds_of(key)
    flag = ("c.flag.row(t.group)[e]" if config["flag"] else "1") if kinds else ""
    more = f", {flag}, c, limit, mask" if kinds else ""
    lse = ""
    if config["layout"] == "blocks":
        lse = """
    lse[at_slot] = empty ? -std::numeric_limits<float>::infinity()
                         : (w.m[i] + std::log2(total)) * 0.69314718f;"""
    place = "slot_of[t.first + i]" if config["src_q"] else "t.first + i"
    src = ", const int32_t* slot_of" if config["src_q"] else ""
    given = ("float* lse" if lse else "float*") + src + ("" if lse else ", int64_t step")
    step = "E" if lse else "step"
    given += ", int64_t limit, const uint8_t* mask" if kinds else ""
    return f"""// One task; `out` and `lse` are those of its head, valid the keys of its batch item.
inline void attend(const Task& t, const Call& c, const Heads& q, const Unit& u, const Scratch& w,
                   int64_t valid, T* out, {given}) {{
  for (int64_t i = 0; i < t.rows; ++i) {{
    widen(at(q, t.first + i), D, w.q + i * D, c.scale * 1.44269504f);
    w.m[i] = -1e30f;
  }}
  std::memset(w.out, 0, t.rows * kEP * sizeof(float));
  std::memset(w.l, 0, t.rows * kLanes * sizeof(float));
  const int32_t* row_ptr = c.row_ptr.row(t.group);
  for (int64_t e = row_ptr[t.block]; e < row_ptr[t.block + 1]; ++e) {{
    const int64_t block = c.col.row(t.group)[e], first = u.k_off[block], full = u.k_off[block + 1] - first;
    const int64_t n = clip(valid - first, full);
    for (int64_t at_key = 0; at_key < n; at_key += kKeys) {{
      const int64_t place = u.start[block] + at_key, rest = full - at_key;
      attend_piece(w, t.rows, t.first, first + at_key, n - at_key < kKeys ? n - at_key : kKeys,
                   round_up(rest < kKeys ? rest : kKeys), u.kp + place * D, u.vp + place * kEP{more});
    }}
  }}
  for (int64_t i = 0; i < t.rows; ++i) {{
    const int64_t at_slot = {place};
    const bool empty = w.m[i] == -1e30f;
    const float total = vsum(vload(w.l + i * kLanes));
    narrow(w.out + i * kEP, E, out + at_slot * {step}, empty ? 0.0f : 1.0f / total);{lse}
  }}
}}"""


_SHAPES = """  const int64_t B = q.sizes()[0], H = q.sizes()[1], S = q.sizes()[2];
  const int64_t Hkv = k.sizes()[1], N = k.sizes()[2];"""


def _arguments(key: KernelKey) -> list[str]:
    names = tensor_names(key)
    lines = [f"  Tensor {name}(stack[{i}]);" for i, name in enumerate(names)]
    for i, name in enumerate(rule_names(key), len(names)):
        lines.append(f"  const int64_t {name} = static_cast<int64_t>(stack[{i}]);")
    lines.append(f"  const double scale = to_double(stack[{len(names) + len(rule_names(key))}]);")
    dtype = dtype_constant(key.dtype)
    if options_of(key)["layout"] != "blocks":
        lines.append(require("q.dim() == 4", "q must have 4 axes"))
        lines.append("  const bool heads_inside = q.strides()[1] < q.strides()[2];")
    for name, size in (("q", "D"), ("k", "D"), ("v", "E")):
        held = f"{name}.is_cpu({dtype}) && {name}.dim() == 4 && {name}.sizes()[3] == {size}"
        lines.append(require(held, f"{name} must be a {key.dtype} tensor [B, H, S, {size}] on the CPU"))
        lines.append(f"  if ({name}.strides()[3] != 1) {name}.make_contiguous({dtype});")
    lines.append(_SHAPES)
    fits = (
        "k.sizes()[0] == B && v.sizes()[0] == B && v.sizes()[1] == Hkv && v.sizes()[2] == N"
        " && Hkv > 0 && H % Hkv == 0"
    )
    lines.append(
        require(fits, "q, k and v must have one batch size, k and v one length, H must be a multiple of Hkv")
    )
    return lines


def _tables(key: KernelKey) -> list[str]:
    """Index tensors checked and wrapped, for the form with a layout."""
    config = options_of(key)
    present = [n for n in tensor_names(key)[3:] if n != "mask"]
    int32 = dtype_constant("int32")
    lines = []
    for name in present:
        axes = 1 if name in ("k_valid", "q_valid", "limit") else 2
        lines.append(
            require(
                f"{name}.is_cpu({int32}) && {name}.dim() == {axes}", f"{name} must be int32 with {axes} axes"
            )
        )
        lines.append(f"  {name}.make_contiguous({int32});")
        if axes == 1:
            lines.append(require(f"{name}.sizes()[0] == B", f"{name} must have one element per batch item"))
    lines.append(
        "  const int64_t G = row_ptr.sizes()[0], nQ = row_ptr.sizes()[1] - 1, nK = k_off.sizes()[1] - 1;"
    )
    lines.append("  const int64_t capacity = col.sizes()[1];")
    for name in (*INDICES[:4], *[n for n in ("flag", "src_q", "src_k") if config[n]]):
        rows = (
            f"{name}.sizes()[0] == G"
            if name in ("row_ptr", "col", "flag")
            else f"({name}.sizes()[0] == 1 || {name}.sizes()[0] == G)"
        )
        lines.append(require(rows, f"{name} must have a row per group"))
        lines.append(
            f"  const Table {name}_t{{{name}.data<int32_t>(), "
            f"{name}.sizes()[0] == 1 ? 0 : {name}.sizes()[1]}};"
        )
    return lines + _bounds_checks(key)


def _bounds_checks(key: KernelKey) -> list[str]:
    """What keeps a wrong layout from reading outside its tensors."""
    config = options_of(key)
    slots_q = "src_q.sizes()[1]" if config["src_q"] else "S"
    slots_k = "src_k.sizes()[1]" if config["src_k"] else "N"
    lines = [
        require("q_off.sizes()[1] == nQ + 1 && nQ >= 0 && nK >= 0", "q_off and row_ptr must have one width"),
        require(
            "rises(row_ptr_t, G, nQ + 1, capacity)", "row_ptr must rise from 0 to at most the width of col"
        ),
        require(f"rises(q_off_t, G, nQ + 1, {slots_q})", "q_off must rise from 0 to at most the query slots"),
        require(f"rises(k_off_t, G, nK + 1, {slots_k})", "k_off must rise from 0 to at most the key slots"),
        require(
            "head_group.sizes()[1] == H && (head_group.sizes()[0] == 1 || head_group.sizes()[0] == B)",
            "head_group must be [1 or B, H]",
        ),
        require(
            "all_below(head_group.data<int32_t>(), head_group.numel(), G)",
            "head_group names a group that is not there",
        ),
        "  for (int64_t g = 0; g < G; ++g) {",
        "    const int64_t used = row_ptr_t.row(g)[nQ];",
        "  " + require("all_below(col_t.row(g), used, nK)", "col names a key block that is not there"),
    ]
    if config["flag"]:
        rules = len(kinds_of(key)) + 1
        lines.append(
            "  "
            + require(
                f"flag.sizes()[1] == capacity && all_below(flag_t.row(g), used, {rules})",
                "flag names a predicate that is not there",
            )
        )
    lines.append("  }")
    for name, most in (("src_q", "S"), ("src_k", "N")):
        if config[name]:
            lines.append(
                require(
                    f"all_below({name}.data<int32_t>(), {name}.numel(), {most})",
                    f"{name} names a token that is not there",
                )
            )
    if config["mask"]:
        lines += [
            require(
                f"mask.is_cpu({dtype_constant('bool')}) && mask.dim() == 4", "mask must be bool with 4 axes"
            ),
            *[
                require(
                    f"mask.sizes()[{i}] == 1 || mask.sizes()[{i}] == {n}", f"mask does not fit along axis {i}"
                )
                for i, n in enumerate(("B", "H", slots_q, slots_k))
            ],
        ]
    return lines


def _output(key: KernelKey) -> list[str]:
    """The result's memory: dense forms order heads and rows as q does, like torch's own attention."""
    dtype = dtype_constant(key.dtype)
    if options_of(key)["layout"] == "blocks":
        return [f"  Tensor out(out_sizes, 4, {dtype});"]
    return [
        "  const int64_t step = heads_inside ? H * E : E, head_step = heads_inside ? E : S * E;",
        "  const int64_t out_strides[4] = {S * H * E, head_step, step, 1};",
        "  AtenTensorHandle made;",
        "  const int32_t device = aoti_torch_device_type_cpu();",
        f"  checked(aoti_torch_empty_strided(4, out_sizes, out_strides, {dtype}, device, 0, &made));",
        "  Tensor out(made);",
    ]


def run_text(key: KernelKey, walk: str) -> str:
    """Everything from the shared structs to the op's entry point."""
    config = options_of(key)
    blocks = config["layout"] == "blocks"
    src, partly = bool(config["src_q"] or config["src_k"]), bool(config["src_q"] or config["q_valid"])
    tail = ", const int32_t* src" if src else ""
    body = [
        "void run(StableIValue* stack, uint64_t, uint64_t) {",
        *_arguments(key),
        *(_tables(key) if blocks else [DENSE_TABLES]),
        "  const int64_t out_sizes[4] = {B, H, S, E};",
        *_output(key),
    ]
    if blocks:
        body += [
            "  Tensor lse(out_sizes, 3, aoti_torch_dtype_float32());",
            f"  bool covered = {'false' if partly else 'true'};  // every row of out is written by a task",
            "  for (int64_t g = 0; g < G; ++g) covered = covered && q_off_t.row(g)[nQ] == S;",
            "  if (!covered) {",
            "    std::memset(out.mutable_data<T>(), 0, out.numel() * sizeof(T));",
            "    float* sums = lse.mutable_data<float>();",
            "    for (int64_t i = 0; i < B * H * S; ++i) sums[i] = -std::numeric_limits<float>::infinity();",
            "  }",
            "  const int32_t* groups = head_group.data<int32_t>();",
            "  const int64_t per_item = head_group.sizes()[0] == 1 ? 0 : H;",
            "  const auto group_of = [&](int64_t b, int64_t h) -> int64_t {",
            "    return groups[b * per_item + h];",
            "  };",
        ]
    else:
        body.append("  const auto group_of = [](int64_t, int64_t) -> int64_t { return 0; };")
    body += [
        f"  const auto head = [](const Tensor& x, int64_t b, int64_t h{tail}) -> Heads {{",
        "    const T* first = x.data<T>() + b * x.strides()[0] + h * x.strides()[1];",
        f"    return {{first, x.strides()[2]{', src' if src else ''}}};",
        "  };",
        *jobs_text(key),
        "  stack[0] = out.release();",
        *(["  stack[1] = lse.release();"] if blocks else []),
        "}",
    ]
    return "\n\n".join((STRUCTS, _call(key), walk, _attend(key), CHECKS, LEASE, "\n".join(body)))
