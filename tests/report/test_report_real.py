"""A report of a real compilation: figures, provenance and the page, from a model in this file."""

from __future__ import annotations

import linecache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilewright.frontends.api import explain
from tilewright.frontends.report_data import page_data
from tilewright.frontends.report_html import page
from tilewright.frontends.report_terminal import plain_lines
from tilewright.frontends.report_why import why


class Layer(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        y = y * self.weight
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer()).eval()
    return explain(
        model, (torch.randn(2, 7, 32),), name="two layers", measure=True, kernels=False, lower="eager"
    )


def test_every_rewrite_of_a_pattern_names_a_line_of_the_model(report):
    seen = 0
    for p in report.passes:
        for a in p.applied:
            if not a.removed:  # a pass that says how often, not where
                continue
            file, _, line = a.source.rpartition(":")
            assert file == __file__, (p.name, a)
            assert linecache.getline(file, int(line)).strip()
            seen += 1
    assert seen >= 10


def test_what_a_pass_inserted_is_not_what_it_read(report):
    norm = next(p for p in report.passes if p.name == "match-rms-norm")
    assert len(norm.applied) == 2
    for a in norm.applied:
        assert len(a.inserted) == 1
        assert not set(a.inserted) & set(a.removed)


def test_costs_are_of_this_model(report):
    linears = sum(c.flops_value for c in report.costs_after if "linear" in c.op)
    assert linears == 2 * 3 * 2 * (2 * 7) * 32 * 64
    assert report.totals_after.launches < report.totals_before.launches
    assert report.totals_after.flops == report.totals_before.flops
    assert report.device == "host"


def test_the_views_agree(report):
    text = "\n".join(plain_lines(report))
    data = page_data(report)
    for p, shown in zip(report.passes, data["passes"], strict=True):
        assert f"pass={p.text}  " in text
        assert len(shown["applied"]) == len(p.applied)
        changed = bool(shown["diff"]["rows"]) if shown["diff"] else False
        assert changed == (p.graph_before != p.graph_after)
    assert data["totals"][1]["launches"] == report.totals_after.launches
    assert page(report).count("<script") == 2


def test_why_finds_the_place(report):
    norm = next(p for p in report.passes if p.name == "match-rms-norm").applied[0]
    assert f"applied at {norm.node}" in why(report, "match-rms-norm", norm.removed[-1])
