"""The policy of early exits: its rewards, its training, its file, and what the pass does with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tilewright.compiler.diagnostics import FactError, LoadError, OptionError
from tilewright.compiler.exit_policy import ExitPolicy
from tilewright.frontends.cli import main
from tilewright.frontends.exit_policy import _fit, train_exit_policy, worth
from tilewright.runtime.exit_counts import counting_exits

ROWS = torch.tensor([[5, 9, 3, 5, 7, 1, 2, 8, 4, 4, 30, 11]])


def _llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def _calls() -> list[Any]:
    return [((), {"input_ids": ROWS, "use_cache": False}), ((), {"input_ids": ROWS + 3, "use_cache": False})]


def _rewards(right: list[bool], exits: list[int], layers: int) -> list[float]:
    """One token's gain of leaving at each exit, rule by rule."""
    best = exits[0]
    while not right[best - exits[0]]:
        best += 1
    wanted = next((e for e in exits if e >= best), None)
    found = []
    for place, exit_ in enumerate(exits, 1):
        following = exits[place] if place < len(exits) else layers
        if exit_ == wanted:
            leave = place / len(exits)
        elif exit_ < best:
            leave = -(best - exit_) / layers
        elif right[exit_ - exits[0]]:
            leave = -0.75 * (exit_ - best) / layers
        else:
            leave = -1.0
        stay = place / len(exits) if exit_ < best else -(following - best) / layers
        found.append(leave - stay)
    return found


def test_rewards_are_those_of_the_rules() -> None:
    torch.manual_seed(3)
    exits, layers = [2, 3, 6], 9
    right = torch.rand(layers - exits[0] + 1, 200) > 0.6
    right[-1] = True
    got = worth(right, exits, layers)
    want = [_rewards(row, exits, layers) for row in right.T.tolist()]
    torch.testing.assert_close(got.T, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert len(set(got.flatten().tolist())) > 10


def test_a_classifier_finds_the_better_answer_and_minds_what_is_at_stake() -> None:
    torch.manual_seed(0)
    rows = torch.randn(400, 5, dtype=torch.float64)
    gain = rows[:, 1] - 0.5
    weight, bias = _fit(rows, gain)
    assert ((rows @ weight + bias > 0) == (gain > 0)).double().mean() > 0.97
    same = torch.zeros(100, 5, dtype=torch.float64)
    heavy = torch.where(torch.arange(100) < 20, 5.0, -1.0).double()
    assert _fit(same, heavy)[1] > 0 > _fit(same, heavy.sign())[1]


def _left(model: Any, policy: ExitPolicy, threshold: float) -> list[int]:
    """How many tokens of ROWS have left at each exit, by hooks on the layers, in float64 features."""
    state: dict[str, Tensor] = {}
    found = []

    def behind(number: int) -> Any:
        def hook(_: Any, args: Any, out: Tensor) -> Tensor:
            x = args[0]
            if number > policy.exits[0]:
                out = torch.where(state["gone"][..., None], x, out)
            if number in policy.exits:
                k, a, b = policy.exits.index(number), out.double(), x.double()
                size = (a * a).mean(-1).sqrt()
                cosine = torch.cosine_similarity(a, b, dim=-1).clamp(0, 1)
                moved = ((a - b) ** 2).mean(-1).sqrt() / size
                w = policy.weight[k].double()
                score = (a / size[..., None]) @ w[:-2] + cosine * w[-2] + moved * w[-1] + policy.bias[k]
                gone = score.sigmoid() > threshold
                state["gone"] = gone | state.get("gone", torch.zeros_like(gone))
                found.append(int(state["gone"].sum()))
            return out

        return hook

    hooks = [layer.register_forward_hook(behind(i + 1)) for i, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        model(input_ids=ROWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.slow
def test_a_trained_policy_decides_and_belongs_to_its_model_and_exits(tmp_path: Path) -> None:
    model, file = _llama(), tmp_path / "policy.json"
    policy = train_exit_policy(model, _calls(), [2, 4], source="a test")
    policy.save(file)
    again = ExitPolicy.load(file)
    assert (again.exits, again.source, again.fingerprint) == ([2, 4], "a test", policy.fingerprint)
    assert torch.equal(again.weight, policy.weight)
    assert torch.equal(again.bias, policy.bias)
    second = train_exit_policy(model, _calls(), [2, 4], source="a test")
    assert torch.equal(second.weight, policy.weight)

    def run(module: Any, exits: str) -> list[int]:
        torch._dynamo.reset()
        text = f"early-exit{{exits={exits},measure=policy,policy={file},threshold=0.4,prompt=true}}"
        options: Any = {"pipeline": text, "lower": "eager", "kernels": False}
        with torch.no_grad(), counting_exits() as counts:
            torch.compile(module, backend="tilewright", options=options)(input_ids=ROWS, use_cache=False)
        return [counts.left[k] for k in sorted(counts.left)]

    want = _left(model, policy, 0.4)
    assert run(model, "2+4") == want
    assert 0 < want[0] < want[1] <= ROWS.numel(), f"the setting proves nothing: {want}"
    with pytest.raises(Exception, match=r"trained for exits \[2, 4\], the pass has \[3\]") as caught:
        run(model, "3")
    assert FactError.__name__ in repr(caught.value) or isinstance(caught.value, FactError)
    with pytest.raises(Exception, match="the exit policy is of another model"):
        run(_llama(1), "2+4")


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ([], "expected ascending"),
        ([3, 2], "expected ascending"),
        ([0], "expected ascending"),
        ([5], "has 5 layers"),
    ],
)
def test_impossible_exits(exits: list[int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        train_exit_policy(_llama(), _calls()[:1], exits)


def test_no_samples() -> None:
    with pytest.raises(OptionError, match="no samples"):
        train_exit_policy(_llama(), [], [2])


@pytest.mark.parametrize(
    "change",
    [
        {"format": "another"},
        {"bias": [0.0]},
        {"weight": [[0.0, 1.0]]},
        {"exits": ["2", "4"]},
        {"bias": [float("nan"), 0.0]},
        {"more": 1},
    ],
)
def test_a_damaged_file_is_one_error(change: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    ExitPolicy("f", [2, 4], torch.zeros(2, 6), torch.zeros(2)).save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(LoadError, match="is damaged|holds no exit policy"):
        ExitPolicy.load(file)
    with pytest.raises(LoadError, match="cannot be read"):
        ExitPolicy.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--exits", "2+x"], "expected numbers joined by +"),
        (["--exits", "2", "--hessian"], "takes neither"),
    ],
)
def test_bad_arguments_of_calibrate(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "smollm2", "--out", str(tmp_path / "p.json"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
