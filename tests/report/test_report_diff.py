"""Graph differences: what changed and nothing else, whatever the numbers of the nodes."""

from __future__ import annotations

import random
import re
import time

from tilewright.frontends.report_diff import graph_diff


def printed(ops):
    """A graph as text: ops is a list of (name, operands as indexes)."""
    lines = [
        f"%{i} f32[4] = {name}({', '.join(f'%{k}' for k in args)})" for i, (name, args) in enumerate(ops)
    ]
    return "\n".join([*lines, f"return [%{len(ops) - 1}]"])


def kinds(diff):
    return [(kind, re.sub(r"%\d+", "%", text)) for kind, text in diff.rows if kind in "-+~"]


def test_an_inserted_node_does_not_change_the_lines_after_it():
    before = [("input", ())] + [(f"op{i}", (i,)) for i in range(50)]
    after = before[:11] + [("cast", (10,))] + [(f"op{i}", (i + 1,)) for i in range(10, 50)]
    diff = graph_diff(printed(before), printed(after))
    assert (diff.removed, diff.inserted, diff.rewired) == (0, 1, 1)
    assert kinds(diff) == [("+", "% f32[4] = cast(%)"), ("~", "% f32[4] = op10(%)")]
    assert diff.rows[0] == ("@", "9")
    assert diff.rows[-1][0] == "@"


def test_swapped_operands_are_a_difference():
    before = [("a", ()), ("b", ()), ("sub", (0, 1))]
    after = [("a", ()), ("b", ()), ("sub", (1, 0))]
    assert kinds(graph_diff(printed(before), printed(after))) == [("~", "% f32[4] = sub(%, %)")]


def test_equal_graphs_have_no_rows():
    text = printed([("a", ()), ("b", (0,))])
    assert graph_diff(text, text).rows == []


def test_the_new_program_can_be_read_off_the_rows():
    rng = random.Random(3)
    for _ in range(60):
        count = rng.randint(5, 60)
        before = [("input", ()), *((rng.choice("abcdefg"), (rng.randint(0, i),)) for i in range(count))]
        keep = sorted(rng.sample(range(1, len(before)), len(before) // 2))
        place = {0: 0, **{old: new + 1 for new, old in enumerate(keep)}}
        after = [before[0]] + [(before[i][0], tuple(place.get(k, 0) for k in before[i][1])) for i in keep]
        diff = graph_diff(printed(before), printed(after), context=1000)
        assert [t for k, t in diff.rows if k in " +~"] == (printed(after).split("\n") if diff.rows else [])
        assert diff.removed - diff.inserted == len(before) - len(after)


def test_long_differences_are_cut_and_counted():
    before = [("input", ())] + [(f"a{i}", (i,)) for i in range(300)]
    after = [("input", ())] + [(f"b{i}", (i,)) for i in range(300)]
    diff = graph_diff(printed(before), printed(after), limit=100)
    assert (diff.removed, diff.inserted) == (300, 300)
    assert len(diff.rows) == 100
    shown = sum(kind in "-+~" for kind, _ in diff.rows)
    assert diff.left_out + shown == 600 + diff.rewired


def test_five_thousand_alike_lines_are_compared_in_time():
    layer = ["pow", "mean", "add", "rsqrt", "mul", "linear", "linear", "linear", "view", "sdpa"]
    before = [("input", ())] + [(layer[i % 10], (i,)) for i in range(5000)]
    kept = [i for i in range(5001) if i == 0 or (i - 1) % 10 not in (0, 1, 2, 3)]
    after = [(before[i][0], (n - 1,) if n else ()) for n, i in enumerate(kept)]
    start = time.process_time()
    diff = graph_diff(printed(before), printed(after))
    assert time.process_time() - start < 3.0
    assert diff.removed - diff.inserted == 2000
    paths = "\n".join(f"{line}  # layers.{i // 10}" for i, line in enumerate(printed(before).split("\n")))
    start = time.process_time()
    assert graph_diff(paths, paths.replace("pow(", "square(")).inserted == 500
    assert time.process_time() - start < 1.0
