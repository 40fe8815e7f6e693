"""The same model gives the same graphs, report, kernels and results in every process, at any hash seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

WORKER = """
import hashlib, json, sys
import torch
from torch.utils._pytree import tree_leaves
from tilewright.frontends.api import explain, optimize
from tilewright.tools.zoo_models import select

TIMED = {"seconds", "roofline_us", "roofline_ms"}

def untimed(value):
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in TIMED}
    return [untimed(v) for v in value] if isinstance(value, (list, tuple)) else value

torch.set_num_threads(1)
found = {}
for entry in select(sys.argv[2:]):
    args, kwargs = entry.inputs()
    report = explain(entry.build(), args, sys.argv[1], kwargs=kwargs, lower="eager")
    torch._dynamo.reset()
    compiled = optimize(entry.build(), args, sys.argv[1], kwargs=kwargs, lower="eager")
    digest = hashlib.sha256()
    for result in tree_leaves(compiled(*args, **kwargs)):
        digest.update(result.contiguous().numpy().tobytes())
    found[entry.name] = {"results": digest.hexdigest(), "report": untimed(report.to_dict())}
    torch._dynamo.reset()
print(json.dumps(found))
"""
PIPELINE = "gqa-unrepeat,common-subexpression,dead-code,fold-norm-scale,fuse-add-rmsnorm,fuse-projections"


def run(seed, names, worker=WORKER):
    env = {**os.environ, "PYTHONHASHSEED": str(seed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", worker, PIPELINE, *names],
        env=env, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def differences(one, other, where=""):
    """Places where two nested values differ."""
    if type(one) is not type(other):
        return [where]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [f"{where}: keys {list(one)} against {list(other)}"]
        return [d for k in one for d in differences(one[k], other[k], f"{where}.{k}")]
    if isinstance(one, list):
        if len(one) != len(other):
            return [f"{where}: {len(one)} against {len(other)} items"]
        return [d for i in range(len(one)) for d in differences(one[i], other[i], f"{where}[{i}]")]
    return [] if one == other else [f"{where}: {one!r:.200} against {other!r:.200}"]


def check(names, seeds):
    first = run(seeds[0], names)
    for name in names:
        report = first[name]["report"]
        assert any(row["source"] for row in report["kernels"])
        assert sum(len(p["applied"]) for p in report["passes"]) > 20
        assert all(len(p["graph_after"]) > 500 for p in report["passes"][1:])
    for seed in seeds[1:]:
        assert not differences(first, run(seed, names), "")[:5], f"hash seed {seed}"


def test_two_processes_agree():
    check(["llama"], [1, 2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-moe", "bert", "wan", "t5"])
def test_twenty_processes_agree(name):
    check([name], list(range(20)))


def test_a_set_of_strings_is_noticed():
    """The comparison sees an order that follows the hash seed."""
    planted = "import json; print(json.dumps({'a': list({f'name{i}' for i in range(50)})}))"
    assert differences(run(1, [], planted), run(2, [], planted))
