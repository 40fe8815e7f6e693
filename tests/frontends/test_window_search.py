"""Windows searched on a model: losses against plain masked attention, the table they give, and its use."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from tilewright.compiler import ops
from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.passes_base import Example, Tensor
from tilewright.compiler.selftest import capture_example
from tilewright.compiler.tiles import tile_grid
from tilewright.frontends.cli import BAD_INPUT, OK, main
from tilewright.frontends.denoise import StepRunner
from tilewright.frontends.phases import phase_pipelines, phase_programs
from tilewright.frontends.window_search import WindowSearch, _Measuring, convert_windows
from tilewright.passes.attention._sites import VideoAttention, sites
from tilewright.passes.attention._tile_layout import reference_mask
from tilewright.runtime.step_state import Schedule, StepState
from tilewright.tools import zoo_diffusion

TILE, GRID, HEADS, LAYERS = (2, 3, 2), (3, 4, 5), 3, 2
CANDIDATES = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 3))


@pytest.fixture(scope="module")
def wan():
    entry = next(e for e in zoo_diffusion.entries() if e.name == "wan")
    torch.manual_seed(0)
    args, kwargs = entry.inputs()
    named = dict(zip(("hidden_states", "timestep", "encoder_hidden_states"), args, strict=True))
    return entry.build().eval(), named | kwargs


def calls(kwargs, steps, seed=0):
    """(timestep, kwargs) of every step."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        noise = torch.randn(kwargs["hidden_states"].shape, generator=generator)
        at = 900 - 100 * step
        yield at, {**kwargs, "hidden_states": noise, "timestep": torch.full((len(noise),), float(at))}


@pytest.fixture(scope="module")
def searched(wan):
    """Two steps, two branches each; and what every attention read in eager calls."""
    model, kwargs = wan
    search = WindowSearch(model, tile=TILE, candidates=CANDIDATES, nondivisible="ceil")
    seen, plain = [], F.scaled_dot_product_attention

    def watch(*rest, **named):
        q, k, v = rest or (named["query"], named["key"], named["value"])
        if q.shape[2] == k.shape[2]:
            seen[-1].append((q, k, v))
        return plain(*rest, **named)

    with search.runner.request("a", [900.0, 800.0]), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for branch, seed in (("cond", 0), ("uncond", 1)):
            for _, given in calls(kwargs, 2, seed):
                with search.runner.branch(branch):
                    got = search.runner(**given)[0]
                patch.setattr(F, "scaled_dot_product_attention", watch)
                seen.append([])
                torch.testing.assert_close(got, model(**given)[0], rtol=1e-4, atol=1e-5)
                patch.undo()
    return search, seen


def test_losses_are_those_of_masked_attention(searched) -> None:
    search, seen = searched
    tiling = tile_grid(GRID, TILE, "ceil")
    for step in range(2):
        for layer in range(LAYERS):
            found = search.losses(step, layer)
            for number, window in enumerate(CANDIDATES):
                mask = reference_mask(tiling, 0, 60, (window,) * HEADS)
                want = torch.zeros(HEADS, dtype=torch.float64)
                for call in (seen[step], seen[2 + step]):
                    q, k, v = (x.double() for x in call[layer])
                    error = F.scaled_dot_product_attention(q, k, v) - F.scaled_dot_product_attention(
                        q, k, v, mask
                    )
                    want += error.square().mean((0, 2, 3)) / 2
                torch.testing.assert_close(found[number], want, rtol=1e-4, atol=0)


def test_the_table_is_the_least_loss(searched) -> None:
    search, _ = searched
    table = search.table(dense_steps=1)
    assert table["fingerprint"]["steps"] == 2
    assert len(table["windows"]) == 2 * LAYERS * HEADS
    for layer in range(LAYERS):
        best = search.losses(1, layer).argmin(0)
        for head in range(HEADS):
            assert table["windows"][f"0_{layer}_{head}"] == [2, 2, 3], "dense steps have the whole grid"
            assert table["windows"][f"1_{layer}_{head}"] == list(CANDIDATES[best[head]])
    cheapest = search.table(weight=1e9)
    assert set(map(tuple, cheapest["windows"].values())) == {(1, 1, 1)}


@pytest.mark.slow
def test_the_planted_window_is_found() -> None:
    """Head 0 attends its own frame, head 1 its own place in all frames."""
    frame = torch.arange(64) // 16
    place = torch.arange(64) % 16
    key = torch.stack([F.one_hot(frame, 16), F.one_hot(place, 16)])[None].float()
    facts = {"video_grid": (4, 4, 4)}
    program = capture_example(
        Example(lambda q, k, v: ops.attention(q, k, v), (Tensor(1, 2, 64, 16),) * 3, facts=facts)
    )
    (site,) = [s for _, s in sites(program) if isinstance(s, VideoAttention)]
    search = WindowSearch(torch.nn.Linear(1, 1), tile=(1, 2, 2), candidates=((1, 2, 2), (4, 1, 1)))
    losses = torch.zeros(2, 2, dtype=torch.float64)

    def add(_, number, loss):
        losses[number] += loss

    marked = search._with_candidates(program, [site], tile_grid((4, 4, 4), (1, 2, 2), "error"))
    v = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0))
    _Measuring(program, marked, add).run(40 * key, key, v)
    assert losses.argmin(0).tolist() == [0, 1]
    assert float(losses.min(0).values.max()) < 1e-2 * float(losses.max())


@pytest.fixture(scope="module")
def table(searched, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "windows.json"
    found = searched[0].table()
    for head in range(HEADS):  # two rows that differ, whatever was found
        found["windows"][f"0_0_{head}"] = [1, 1, 1]
        found["windows"][f"1_0_{head}"] = [2, 2, 3]
    path.write_text(json.dumps(found))
    return path


@pytest.mark.slow
def test_every_step_runs_its_row(wan, table) -> None:
    model, kwargs = wan
    text = f"sliding-tile-attention{{tile=2x3x2,nondivisible=ceil,table={table}}}"
    options = {"lower": "eager"}
    programs = phase_programs(model, text, options)
    assert programs["sparse@0"] is not programs["sparse@1"]
    runner = StepRunner(model, state=StepState(), schedule=Schedule(), models=programs)
    with runner.request("a", [900.0, 800.0, 700.0]), torch.no_grad():
        for step, (at, given) in enumerate(calls(kwargs, 3)):
            if step == 2:
                with pytest.raises(OptionError, match="step 2 is sparse, and the programs are for"):
                    runner(**given)
                break
            row = {**options, "pipeline": text.replace("table=", f"step={step},table=")}
            want = torch.compile(model, backend="tilewright", options=row)(**given)[0]
            assert torch.equal(runner(**given)[0], want), at


def test_steps_with_one_row_share_a_program(table, tmp_path) -> None:
    data = json.loads(table.read_text())
    rows = {k.split("_", 1)[1]: v for k, v in data["windows"].items() if k[0] == "1"}
    data["windows"] |= {f"2_{k}": v for k, v in rows.items()}
    path = tmp_path / "three.json"
    path.write_text(json.dumps(data))
    found = phase_pipelines(f"sliding-tile-attention{{tile=2x3x2,nondivisible=ceil,table={path}}}")
    assert found["sparse@1"] is found["sparse@2"] is not found["sparse@0"]


@pytest.mark.slow
def test_ten_rows_are_ten_programs(wan, tmp_path) -> None:
    """Dynamo gives up on a function after eight compilations and would run the plain model."""
    model, kwargs = wan
    program_rows = [[1, 1, 1], [2, 1, 1], [1, 2, 1], [1, 1, 3], [2, 2, 1], [2, 1, 3], [1, 2, 3]]
    search = WindowSearch(model, tile=TILE, candidates=CANDIDATES, nondivisible="ceil")
    with search.runner.request("a", [900.0]):
        search.runner(**kwargs)
    found = search.table()
    pairs = [(a, b) for a in program_rows for b in program_rows][:10]
    found["windows"] = {
        f"{step}_{layer}_{head}": windows[layer]
        for step, windows in enumerate(pairs)
        for layer in range(LAYERS)
        for head in range(HEADS)
    }
    path = tmp_path / "ten.json"
    path.write_text(json.dumps(found))
    text = f"sliding-tile-attention{{tile=2x3x2,nondivisible=ceil,table={path}}}"
    programs = phase_programs(model, text, {"lower": "eager"})
    runner = StepRunner(model, state=StepState(), schedule=Schedule(), models=programs)
    outputs = []
    with runner.request("a", [1000.0 - i for i in range(10)]), torch.no_grad():
        for step in range(10):
            with runner.branch("cond", step_index=step):
                outputs.append(runner(**kwargs)[0])
    dense = model(**kwargs)[0]
    for i, one in enumerate(outputs):
        assert not torch.allclose(one, dense, rtol=1e-4, atol=1e-5), i
        assert all(not torch.equal(one, other) for other in outputs[:i]), i


def flat(change=None):
    entries = {
        f"{s}_{layer}_{h}": [1, 1, 1] if h else [2, 2, 3]
        for s in range(2)
        for layer in range(LAYERS)
        for h in range(HEADS)
    }
    if change is not None:
        change(entries)
    return entries


@pytest.mark.slow
def test_a_published_table_is_taken_over(wan, tmp_path) -> None:
    model, kwargs = wan
    path = tmp_path / "flat.json"
    path.write_text(json.dumps(flat()))
    found = convert_windows(model, ((), kwargs), str(path), tile=TILE, nondivisible="ceil")
    assert found["windows"] == flat()
    assert found["fingerprint"]["grid"] == list(GRID)
    assert found["fingerprint"]["steps"] == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e.pop("0_1_1"), "11 of 2 x 2 x 3 entries"),
        pytest.param(
            lambda e: e.update({f"{s}_2_{h}": [1, 1, 1] for s in range(2) for h in range(3)}),
            "has 2 of 3",
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda e: e.update({"0_0_0": [1, 1, 5]}), "the grid has 3", marks=pytest.mark.slow),
        (lambda e: e.update({"0_0_0": [1, 1]}), "three whole numbers"),
        (lambda e: e.clear(), "expected"),
    ],
)
def test_tables_that_do_not_fit(wan, tmp_path, change, said) -> None:
    model, kwargs = wan
    path = tmp_path / "flat.json"
    path.write_text(json.dumps(flat(change)))
    with pytest.raises(OptionError, match=said):
        convert_windows(model, ((), kwargs), str(path), tile=TILE, nondivisible="ceil")


def test_bad_searches(searched) -> None:
    search, _ = searched
    for problem, said in (
        (lambda: WindowSearch(torch.nn.Linear(1, 1), tile=TILE, candidates=()), "candidates = "),
        (lambda: search.losses(7, 0), "no request ran step 7"),
        (lambda: search.table(dense_steps=3), "dense_steps = 3"),
        (lambda: search.table(weight=float("nan")), "weight = nan"),
        (lambda: WindowSearch(torch.nn.Linear(1, 1), tile=TILE).table(), "no request ran"),
    ):
        with pytest.raises(OptionError, match=said):
            problem()


def test_bad_commands(tmp_path, capsys) -> None:
    out = str(tmp_path / "w.json")
    for arguments, said in (
        (["toy-video-dit", "--out", out, "--tile", "2x4"], "--tile = '2x4'"),
        (["toy-video-dit", "--out", out, "--tile", "2x4x4"], "--candidates is missing"),
        (["tiny-video-dit", "--out", out, "--tile", "2x4x4", "--candidates", "1x1x1"], "toy-video-dit only"),
        (["toy-video-dit", "--out", str(tmp_path / "no" / "w"), "--tile", "2x4x4"], "folder that exists"),
    ):
        assert main(["windows", *arguments]) == BAD_INPUT
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_searches_the_toy(tmp_path, capsys) -> None:
    out = tmp_path / "w.json"
    how = ["--tile", "2x4x4", "--candidates", "1x3x3,2x1x3", "--steps", "4", "--dense-steps", "1"]
    assert main(["windows", "toy-video-dit", "--out", str(out), *how, "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["windows"]["2x4x4"] == 16
    text = f"sliding-tile-attention{{tile=2x4x4,table={out},step=2}}"
    assert main(["explain", "toy-video-dit", "--pipeline", text, "--json"]) == OK
    passes = json.loads(capsys.readouterr().out)["passes"]
    assert len(next(p for p in passes if p["name"] == "sliding-tile-attention")["applied"]) == 4
