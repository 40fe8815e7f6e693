"""C++ of a plan: one function, all threads walk its stages together and meet at barriers where they must.

A stage is either shared out (rows of a weight, elements of a vector, keys of a cache) or, when it is too
small for that, done by every thread for itself. A barrier stands only in front of a stage that reads what
another thread may have written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from tilewright.compiler.float_format import AnyFormat, parse_format
from tilewright.compiler.weight_format import WeightFormat
from tilewright.kernels.chain import parts
from tilewright.kernels.chain.formats import format_text, row_floats
from tilewright.kernels.chain.plan import Plan, Stage
from tilewright.kernels.common.abi import HEADER
from tilewright.kernels.common.cpp import NAMESPACE, vector_text
from tilewright.kernels.gated_mlp.cpp import ACTIVATION
from tilewright.kernels.linear.cpp import AHEAD_BYTES, dot_text

MAX_SHARES = 64
_ALIGN = 16
_HELPERS = {
    "linear": parts.LINEAR,
    "rms_norm": parts.RMS_NORM,
    "layer_norm": parts.LAYER_NORM,
    "rope": parts.ROPE,
    "kv_update": parts.KV_UPDATE,
    "attention": parts.ATTENTION,
}


@dataclass
class _Emitter:
    """Writes the stages of one plan."""

    plan: Plan
    space: str = ""
    """Where the functions of attention stand: `wide::` for vectors wider than those of the rest."""
    lines: list[str] = field(default_factory=list)
    where: dict[int, str] = field(default_factory=dict)
    """C++ expression of the pointer of each value that has a place."""
    pending: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Values written since the last barrier: how they were shared out."""
    shared: int = 0
    mine: int = 0
    found: int = 0
    """Floats per share for the partial results of attention."""
    scores: int = 0
    formats: dict[AnyFormat, int] = field(default_factory=dict)
    prepared: set[str] = field(default_factory=set)
    """Activations that were made ready for a format."""
    merging: bool = False
    """Threads may still be reading partial results."""
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for i, given in enumerate(self.plan.inputs):
            if given.value not in self.plan.scalars:
                self.where[given.value] = f"in{i}"
            else:
                self.before.append(f"  const int64_t s{given.value} = *in{i};")

    def body(self) -> str:
        for stage in self.plan.stages:
            getattr(self, f"_{stage.kind}")(stage)
        self._outputs()
        return "\n".join(f"    {line}" for line in self.lines)

    def read(self, stage: Stage, shared_as: tuple[str, int] | None) -> None:
        """Put a barrier when the stage reads what another thread wrote."""
        late = [v for v in stage.reads if v in self.pending and self.pending[v] != shared_as]
        if late:
            self.meet()

    def meet(self) -> None:
        """A barrier: everything written so far may be read, everything read so far may be written."""
        self.lines.append("barrier.wait(share);")
        self.pending.clear()
        self.merging = False

    def place(self, value: int, *, own: bool) -> str:
        """Memory for a result: the thread's own, shared, or an output tensor."""
        size = -(-self.plan.sizes[value] // _ALIGN) * _ALIGN
        if own:
            self.where[value], self.mine = f"(mine + {self.mine})", self.mine + size
        elif value in self.plan.outputs:
            self.where[value] = f"out{self.plan.outputs.index(value)}"
        else:
            self.where[value], self.shared = f"(shared + {self.shared})", self.shared + size
        return self.where[value]

    def at(self, value: int) -> str:
        return "nullptr" if value < 0 else self.where[value]

    def _linear(self, stage: Stage) -> None:
        rows, columns = stage.numbers
        self.read(stage, None)
        y = self.place(stage.writes[0], own=False)
        x, weight, bias = map(self.at, stage.reads)
        low, high = f"share.low({rows})", f"share.high({rows})"
        self.lines.append(f"linear({weight}, {bias}, {x}, {columns}, {low}, {high}, {y});")
        self.pending[stage.writes[0]] = ("rows", int(rows))

    def _quantized_linear(self, stage: Stage) -> None:
        rows, columns, text = stage.numbers
        form = parse_format(str(text))
        self.read(stage, None)
        x, weight, bias = map(self.at, stage.reads)
        space, chunks = f"f{self.formats.setdefault(form, len(self.formats))}", -(-int(columns) // 32)
        static = isinstance(form, WeightFormat) and form.has_step
        # A prepared row serves every weight of a format; static ones each hold a step.
        row = f"row{stage.reads[0]}_{space}" + (f"_{stage.reads[1]}" if static else "")
        if row not in self.prepared:
            self.prepared.add(row)
            step = f", {space}::step_of({weight}, {rows}, {chunks})" if static else ""
            floats = row_floats(form, int(columns)) + _ALIGN
            self.lines.append(f"const {space}::Row {row} = {space}::row_at(mine + {self.mine}, {chunks});")
            self.lines.append(f"{space}::prepare_row({x}, {columns}, {row}{step});")
            self.mine += -(-floats // _ALIGN) * _ALIGN
        y = self.place(stage.writes[0], own=False)
        low, high = f"share.low({rows})", f"share.high({rows})"
        self.lines.append(f"{space}::multiply({weight}, {bias}, {row}, {chunks}, {low}, {high}, {y});")
        self.pending[stage.writes[0]] = ("rows", int(rows))

    def _elementwise(self, stage: Stage, formula: str) -> None:
        size = self.plan.sizes[stage.writes[0]]
        split = any(self.pending.get(v) == ("rows", size) for v in stage.reads)
        self.read(stage, ("rows", size) if split else None)
        y = self.place(stage.writes[0], own=not split)
        low, high = (f"share.low({size})", f"share.high({size})") if split else ("0", str(size))
        loads = {"a": self.at(stage.reads[0]), "b": self.at(stage.reads[-1])}
        for name, pointer in loads.items():
            formula = formula.replace(f"@{name}", f"load({pointer} + i, n)")
        call = f"each({low}, {high}, {y}, [&](int64_t i, int64_t n) {{ return {formula}; }});"
        self.lines.append(call)
        if split:
            self.pending[stage.writes[0]] = ("rows", size)

    def _binary(self, stage: Stage) -> None:
        self._elementwise(stage, f"v{stage.numbers[0]}(@a, @b)")

    def _scaled(self, stage: Stage) -> None:
        self._elementwise(stage, f"v{stage.numbers[0]}(@a, vset({_number(stage.numbers[1])}))")

    def _unary(self, stage: Stage) -> None:
        self._elementwise(stage, f"act_{stage.numbers[0]}(@a)")

    def _gated(self, stage: Stage) -> None:
        self._elementwise(stage, f"vmul(act_{stage.numbers[0]}(@a), @b)")

    def _own(self, stage: Stage, name: str, *arguments: str) -> None:
        self.read(stage, None)
        given = [self.at(v) for v in stage.reads]
        y = self.place(stage.writes[0], own=True)
        self.lines.append(f"{name}({', '.join([*given, *arguments, y])});")

    def _rms_norm(self, stage: Stage) -> None:
        rows, width, eps, offset = stage.numbers
        self._own(stage, "rms_norm", _number(eps), _number(offset), str(rows), str(width))

    def _layer_norm(self, stage: Stage) -> None:
        rows, width, eps = stage.numbers
        self._own(stage, "layer_norm", _number(eps), str(rows), str(width))

    def _rope(self, stage: Stage) -> None:
        self._own(stage, "rope", *map(str, stage.numbers))

    def _sum(self, stage: Stage) -> None:
        terms = [*(f"s{v}" for v in stage.reads), str(stage.numbers[0])]
        self.before.append(f"  const int64_t s{stage.writes[0]} = {' + '.join(terms)};")

    def _store(self, stage: Stage) -> None:
        place = next(i for i, g in enumerate(self.plan.inputs) if g.value == stage.writes[0])
        self.after.append(f"  *in{place} = s{stage.reads[0]};")

    def _kv_update(self, stage: Stage) -> None:
        heads, length, width = stage.numbers
        row, position = stage.reads
        self.before.append(
            f"  require(s{position} >= 0 && s{position} < {length},"
            ' "the position lies outside of the cache");'
        )
        self.read(Stage("", (row,), ()), None)
        call = (
            f"kv_update({self.at(row)}, s{position}, {heads}, {length}, {width}, {self.at(stage.writes[0])});"
        )
        self.lines.append(f"if (share.first()) {call}")
        self.pending[stage.writes[0]] = ("first", 0)

    def _attention(self, stage: Stage) -> None:
        heads, group, length, width, value_width = (int(n) for n in stage.numbers[:5])
        self.read(stage, None)
        if self.merging:
            self.meet()
        q, k, v, mask = map(self.at, stage.reads)
        queries = heads * group
        room = queries * (value_width + 2)
        self.found, self.scores = max(self.found, room), max(self.scores, min(group, 3) * (length + 16))
        block = [
            "{",
            f"  int64_t from = 0, to = {length};",
            *_window(str(stage.numbers[6]), mask),
            "  const int64_t low = from + share.low(to - from), high = from + share.high(to - from);",
            f"  float* mine_found = found + share.begin * {room};",
            "  for (int64_t s = share.begin + 1; s < share.end; ++s)",
            f"    {self.space}empty(found + s * {room}, {queries}, {value_width});",
            f"  for (int64_t h = 0; h < {heads}; ++h) {{",
            f"    const float* keys = {k} + h * {length * width};",
            f"    const float* values = {v} + h * {length * value_width};",
        ]
        for first in range(0, group, 3):
            count = min(3, group - first)
            head = f"h * {group} + {first}"
            block.append(
                f"    {self.space}attend<{count}, {width}, {value_width}>({q} + ({head}) * {width}, keys,"
                f" values, mask, low, high, {_number(stage.numbers[5])}, scores,"
                f" mine_found + ({head}) * {value_width},"
                f" mine_found + {queries * value_width} + {head},"
                f" mine_found + {queries * (value_width + 1)} + {head});"
            )
        self.lines += [*block, "  }", "}"]
        self.meet()
        out = self.place(stage.writes[0], own=True)
        self.lines.append(f"{self.space}merge(found, share.of, {queries}, {value_width}, {out});")
        self.merging = True

    def _outputs(self) -> None:
        for i, value in enumerate(self.plan.outputs):
            if self.where[value] != f"out{i}":
                if value in self.pending:
                    self.meet()
                size = f"{self.plan.sizes[value]} * sizeof(float)"
                self.lines.append(f"if (share.first()) std::memcpy(out{i}, {self.where[value]}, {size});")


def _window(kind: str, mask: str) -> list[str]:
    """Trim keys that the mask shuts out at both ends; what it does in between."""
    if kind == "none":
        return ["  const auto mask = [](int64_t, float score) { return score; };"]
    none = "-std::numeric_limits<float>::infinity()"
    is_bool = kind == "bool"
    shut = "!{0}[{1}]" if is_bool else f"{{0}}[{{1}}] == {none}"
    value = f"{mask}[t] ? score : {none}" if is_bool else f"score + {mask}[t]"
    return [
        f"  while (to > 0 && {shut.format(mask, 'to - 1')}) --to;",
        f"  while (from < to && {shut.format(mask, 'from')}) ++from;",
        f"  const auto mask = [&](int64_t t, float score) {{ return {value}; }};",
    ]


def _number(value: int | float | str) -> str:
    text = float(value)
    if text != text or text in (float("inf"), float("-inf")):
        raise ValueError(f"{value!r} is not a finite number")
    return f"{text!r}f"


_CTYPE = {"float32": "float", "int64": "int64_t", "bool": "bool", "uint8": "uint8_t"}


def _load(plan: Plan) -> list[str]:
    lines = []
    for i, given in enumerate(plan.inputs):
        ctype, count = _CTYPE[given.dtype], plan.sizes[given.value]
        const = "" if given.written else "const "
        data = "mutable_data" if given.written else "data"
        lines += [
            f"  Tensor t{i}(stack[{i}]);",
            f"  t{i}.require_flat(aoti_torch_dtype_{given.dtype}(), {count});",
            f"  {const}{ctype}* in{i} = t{i}.{data}<{ctype}>();",
        ]
    return lines


def schema(plan: Plan) -> str:
    """`(Tensor t0, Tensor(a!) t1, ...) -> (Tensor, ...)`; an input with an alias mark is written."""
    marks = [f"({_letters(i)}!)" if g.written else "" for i, g in enumerate(plan.inputs)]
    given = ", ".join(f"Tensor{mark} t{i}" for i, mark in enumerate(marks))
    count = len(plan.outputs)
    result = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
    return f"({given}) -> {result}"


def _letters(number: int) -> str:
    return f"m{number}"


def source(plan: Plan, arch: str) -> tuple[str, str]:
    """(op name, source text); the name is a digest of the text."""
    digest = hashlib.sha256(_text(plan, arch, "tw_op").encode()).hexdigest()[:10]
    name = f"chain_{digest}"
    return name, _text(plan, arch, name)


def _text(plan: Plan, arch: str, op: str) -> str:
    kinds = {s.kind for s in plan.stages}
    # The packed form is made for vectors of 8; keys and values are not.
    lanes = "avx2" if "quantized_linear" in kinds else arch
    wide = "attention" in kinds and lanes != arch
    emitter = _Emitter(plan, "wide::" if wide else "")
    body = emitter.body()
    acts = sorted({str(s.numbers[0]) for s in plan.stages if s.kind in ("unary", "gated")})
    needs = {"partial", "sum", "exp", "max", "abs"} | {n for a in acts for n in ACTIVATION[a][1]}
    helpers = [parts.TEAM, parts.VECTORS]
    if kinds & {"linear", "attention", "quantized_linear"}:
        helpers.append(f"using T = float;\nconstexpr int64_t kAhead = {AHEAD_BYTES};  // bytes")
    if "linear" in kinds or ("attention" in kinds and not wide):
        helpers.append(dot_text("float32", lanes))
    helpers += [f"inline Vec act_{a}(Vec g) {{ return {ACTIVATION[a][0]}; }}" for a in acts]
    helpers += [format_text(form, f"f{number}", arch) for form, number in emitter.formats.items()]
    helpers += [text for kind, text in _HELPERS.items() if kind in kinds - ({"attention"} if wide else set())]
    if wide:
        inner = (vector_text(arch, needs), parts.VECTORS, dot_text("float32", arch), parts.ATTENTION)
        helpers.append("\n\n".join(("namespace wide {", *inner, "}  // namespace wide")))
    return _FILE.format(
        count=len(plan.stages),
        arch=arch,
        header=HEADER,
        vector=vector_text(lanes, needs),
        helpers="\n\n".join(helpers),
        run=_run(plan, emitter, body),
        space=NAMESPACE,
        op=op,
        schema=schema(plan),
    )


def _run(plan: Plan, emitter: _Emitter, body: str) -> str:
    outputs = []
    for i, shape in enumerate(plan.shapes):
        sizes = ", ".join(map(str, shape)) or "1"
        outputs.append(f"  const int64_t shape{i}[] = {{{sizes}}};")
        outputs.append(f"  Tensor o{i}(shape{i}, {len(shape)}, aoti_torch_dtype_float32());")
        outputs.append(f"  float* out{i} = o{i}.mutable_data<float>();")
    released = [f"  stack[{i}] = o{i}.release();" for i in range(len(plan.outputs))]
    return "\n".join(
        [
            "void run(StableIValue* stack, uint64_t, uint64_t) {",
            *_load(plan),
            *emitter.before,
            *outputs,
            f"  const int64_t shares = thread_count() < {MAX_SHARES} ? thread_count() : {MAX_SHARES};",
            f"  float* shared = scratch(0, {emitter.shared} + shares * {emitter.found});",
            *([f"  float* found = shared + {emitter.shared};"] if emitter.found else []),
            "  Barrier barrier;",
            "  parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {",
            "    const Share share{begin, end, shares};",
            f"    float* mine = scratch(1, {emitter.mine} + {emitter.scores});",
            *([f"    float* scores = mine + {emitter.mine};"] if emitter.scores else []),
            body,
            "  });",
            *emitter.after,
            *released,
            "}",
        ]
    )


_FILE = """// {count} stages of a decode step in one function.
// Generated by Tilewright for cpu:{arch}. One row of activations; weights are read in place.
#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "{header}"

namespace {{

{vector}

{helpers}

{run}

const Registration registration("{space}", run, {{"{op}{schema}"}}, {{"{op}"}});

}}  // namespace
"""


def describe(plan: Plan) -> Sequence[str]:
    """One line per stage, for the report."""
    return [f"{s.kind} {' '.join(map(str, s.numbers))}".strip() for s in plan.stages]
