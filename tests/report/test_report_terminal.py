"""The terminal view and `why`: what they say, in tables and in lines, whatever names a model brings."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.report import PassReport, Refused, Report, Totals
from tilewright.frontends.report_source import source_lines
from tilewright.frontends.report_terminal import lines_for, plain_lines, show
from tilewright.frontends.report_text import change, clean, duration, group_refusals, number
from tilewright.frontends.report_why import why


def shown(report, *, terminal, width=120):
    out = io.StringIO()
    show(report, Console(file=out, force_terminal=terminal, width=width, no_color=True))
    return out.getvalue()


def test_tables_hold_the_figures_of_the_report(make_report):
    text = shown(make_report(6), terminal=True, width=200)
    for wanted in (
        "What it saved",
        "-26.3 %",
        "match-rms-norm",
        "out of fuel after 30 rewrites",
        "tw_gemv_avx2",
    ):
        assert wanted in text
    for wanted in (
        "call to print",
        "layer_of_attention",
        "2.2e-07",
        "21 s",
        "at s0 = 7",
        "6 rewrites in 43 ms",
    ):
        assert wanted in text


def test_a_pipe_gets_plain_lines(make_report):
    text = shown(make_report(6), terminal=False)
    assert "\x1b" not in text
    assert "┃" not in text
    assert "  what=launches  before=114  after=84  change=-26.3 %" in text
    assert "pass=match-rms-norm  stage=normalize  exactness=rounding  applied=6  refused=1" in text


def test_a_line_is_not_broken_at_the_width_of_the_console(make_report):
    lines = shown(make_report(6), terminal=False, width=30).splitlines()
    assert lines == plain_lines(make_report(6))


def test_refusals_are_grouped_with_the_nearest_miss_first():
    refused = [Refused("a", f"n{i}", "too wide", depth=i % 3) for i in range(9)]
    refused += [Refused("a", "m", "no weight", depth=5), Refused("b", "m", "too wide", depth=0)]
    groups = group_refusals(refused)
    assert [(g.rule, g.reason, g.count, g.nearest.depth) for g in groups] == [
        ("a", "no weight", 1, 5),
        ("a", "too wide", 9, 2),
        ("b", "too wide", 1, 0),
    ]


def test_one_reason_at_many_nodes_is_one_reason():
    refused = [Refused("", f"linear_{i}", f"no other linear reads reshape_{i}") for i in range(30)]
    (group,) = group_refusals([*refused, Refused("", "linear", "no other linear reads reshape", depth=1)])
    assert (group.count, group.reason) == (31, "no other linear reads reshape")
    assert len(group_refusals([Refused("", "a", "x has 3 rows"), Refused("", "b", "x has 4 rows")])) == 2


def test_many_reasons_are_cut_and_counted():
    refused = [Refused("r", "n", f"reason {i}") for i in range(40)]
    report = Report(passes=[PassReport("p", "p", "LOWER", "bitwise", refused=refused)])
    text = "\n".join(plain_lines(report))
    assert text.count("reason=reason ") == 5
    assert "count=35  reason=35 more reasons" in text


def test_the_same_module_of_all_layers_is_one_row(make_report):
    line = next(x for x in plain_lines(make_report(6)) if "module=model.layers.*.mlp.gate_proj" in x)
    assert "count=6" in line
    assert "us=450" in line


def test_an_empty_report_is_only_a_heading():
    assert plain_lines(Report(model="m")) == ["m | pipeline: (empty)"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_graph_that_was_left_alone_is_said(make_report, terminal):
    why_not = "CaptureError: autocast inside the graph\x1b[2J"
    text = shown(Report(model="m", left_alone=why_not), terminal=terminal)
    assert r"left as it was: CaptureError: autocast inside the graph\x1b[2J" in text
    assert "left as it was" not in shown(make_report(2), terminal=terminal)


def test_unknown_sizes_are_said(make_report):
    report = make_report(2)
    report.totals_after = Totals(1.0, 1.0, 1, 1.0, unknown=3)
    assert any("3 nodes without a known size are left out" in line for line in plain_lines(report))


HOSTILE = [
    "\x1b[2J\x1b]0;owned\x07",
    "[red]x[/red]",
    "a\nb\r\x08",
    "\u202egnp.exe",
    "\u2028",
    "\ud800",
    "\x9b31m",
]


@pytest.mark.parametrize("bad", HOSTILE)
@pytest.mark.parametrize("terminal", [True, False])
def test_names_do_not_steer_the_terminal(make_report, bad, terminal):
    report = make_report(2, name=lambda text: f"{bad}{text}")
    text = shown(report, terminal=terminal, width=400)
    honest = shown(make_report(2), terminal=terminal, width=400)
    steering = set(text) - set(honest)
    assert not {c for c in steering if ord(c) < 32 or ord(c) in (0x9B, 0x202E, 0x2028, 0xD800)}
    assert text.count("\x1b[2J") == text.count("\x1b]") == 0
    assert clean(bad) in text


def test_a_large_report_is_shown_in_time(make_report):
    report = make_report(250)
    assert len(report.costs_before) == 5000
    start = time.process_time()
    plain_lines(report)
    assert time.process_time() - start < 1.0


def test_numbers_have_units():
    assert [number(v, "B") for v in (0, 7, 999.4, 999.6, 1234, 5.5e9, None)] == [
        "0 B",
        "7 B",
        "999 B",
        "1 kB",
        "1.23 kB",
        "5.5 GB",
        "unknown",
    ]
    assert [duration(v) for v in (2.5, 0.25, 2.5e-4, None)] == ["2.5 s", "250 ms", "250 us", "unknown"]
    assert [change(4, 2), change(2, 2), change(0, 2)] == ["-50 %", "unchanged", ""]


def test_why_it_did_not_apply(make_report):
    text = why(make_report(6), "qkv", "q_1")
    assert "fuse-projections did not apply at q_1 (" in text
    assert "model.layers.1.self_attn): weight k_proj is tied to another parameter" in text
    assert "pattern calls that matched before this: 1" in text
    assert "the reason is about: k_1, tilewright.linear.default" in text
    assert '> ("q", "tilewright.linear.default"' in text
    assert "nearest miss elsewhere: q_2" in text


def test_why_it_did_apply(make_report):
    text = why(make_report(6), "match-rms-norm", "rsqrt_3")
    assert "applied at mul_3" in text
    assert "inserted: rms_norm_3" in text
    assert "removed: pow_3, mean_3, add_3, rsqrt_3, mul_3" in text
    assert "relative RMS difference" in text
    assert why(make_report(6), "match-rms-norm", "model.layers.3").count("applied at") == 1


def test_why_it_was_not_even_looked_at(make_report):
    report = make_report(6)
    text = why(report, "match-rms-norm", "gate_2")
    assert "neither applied nor refused there: gate_2 is tilewright.linear.default" in text
    assert "nearest miss elsewhere: mul_1_0" in text
    assert "skipped: out of fuel" in why(report, "fold-constants", "gate_2")


def test_why_names_the_nearest_rule_and_node(make_report):
    report = make_report(2)
    with pytest.raises(OptionError, match=r"rule 'match-rms' is not in this report .*'match-rms-norm'"):
        why(report, "match-rms", "mul_0")
    with pytest.raises(OptionError, match=r"node 'gat_1' is not in this report .*'gate_1'"):
        why(report, "match-rms-norm", "gat_1")


def test_only_regular_python_files_are_read(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("token\n")
    code = tmp_path / "model.py"
    code.write_text("a\nb\nc\nd\n")
    assert source_lines(f"{code}:2", around=1) == [(1, "a"), (2, "b"), (3, "c")]
    for source in (f"{secret}:1", f"{code}:0", f"{code}:99", f"{code}:x", f"{tmp_path}.py:1", "a\0.py:1", ""):
        assert source_lines(source) == []


def test_lines_for_a_stream_are_tables_only_on_a_terminal(make_report):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    report = make_report(2)
    assert lines_for(report, io.StringIO()) == plain_lines(report)
    assert any("┃" in line for line in lines_for(report, Terminal()))
