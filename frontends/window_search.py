"""Offline search of sliding-tile windows (arXiv:2502.04507): which window each head loses least by, per step.

The model denoises densely. At every video self-attention each candidate window is also computed, and its
mean squared difference to the dense output is added up per step, layer and head, over both branches of
guidance and all requests, so that both branches share a window.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from tilewright.compiler import Program, ops
from tilewright.compiler.diagnostics import CaptureError, OptionError, TilewrightError
from tilewright.compiler.facts import derive_facts
from tilewright.compiler.tiles import Nondivisible, Tiling, Triple, check_window, tile_grid, window_density
from tilewright.frontends.capture import from_dynamo, normalize
from tilewright.frontends.denoise import StepRunner
from tilewright.frontends.loaded_model import Call
from tilewright.kernels.table import KernelChoice, host_target, select_for_node
from tilewright.passes.attention._sites import VideoAttention, sites
from tilewright.passes.attention._sparse_call import Constants, insert_sparse, with_key_mask
from tilewright.passes.attention._tile_layout import text_blocks, tile_layout
from tilewright.passes.attention._window_table import checkpoint_of, parse_windows, read_json

CANDIDATES: tuple[Triple, ...] = ((3, 1, 10), (1, 5, 7), (3, 3, 3), (1, 6, 5), (1, 3, 10), (3, 6, 1))
"""Those published for Wan2.1, whose grid is 3 x 6 x 10 tiles."""


class WindowSearch:
    """What every candidate window loses at every step, layer and head of the requests that `runner` runs.

    `runner` is a StepRunner: a loop of one's own runs inside `search.runner.request(name, timesteps)`, a
    diffusers pipeline inside `driven(pipe, search.runner, request=..., steps=...)`. Then `table` chooses. Of
    a pipeline's two transformers each has a search and a table of the steps it runs.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        tile: Triple,
        candidates: Iterable[Triple] = CANDIDATES,
        nondivisible: Nondivisible = "error",
    ) -> None:
        """module: a video transformer. tile: tokens along T, Y, X. candidates: windows in tiles.

        OptionError for no candidates or one given twice; whether they fit the grid shows at the first call.
        """
        self.tile, self.candidates, self.nondivisible = tile, tuple(candidates), nondivisible
        if not self.candidates or len(set(self.candidates)) < len(self.candidates):
            raise OptionError(f"candidates = {self.candidates}: expected windows, each once")
        apart: dict[str, Any] = {"isolate_recompiles": True}
        self._compiled = torch.compile(module, backend=self._backend, dynamic=False, **apart)
        self._losses: dict[tuple[int, int], Tensor] = {}
        self._calls: dict[tuple[int, int], int] = {}
        self._found: dict[str, Any] | None = None
        self._tiling: Tiling | None = None
        self.runner = StepRunner(self._call)

    def losses(self, step: int, layer: int) -> Tensor:
        """float64 [candidates, heads]: mean squared difference to the dense output; OptionError if unseen."""
        if (step, layer) not in self._losses:
            raise OptionError(f"no request ran step {step} of layer {layer}")
        return self._losses[step, layer] / self._calls[step, layer]

    def table(self, *, dense_steps: int = 0, weight: float = 0.0) -> dict[str, Any]:
        """The window table: for every step, layer and head the candidate of least loss + weight * density.

        dense_steps: steps at the beginning that get the whole grid. Of equal candidates the earlier wins.
        OptionError where nothing ran, or where a window of the whole grid is a candidate and costs nothing.
        """
        if self._found is None or self._tiling is None:
            raise OptionError("no request ran", remedy="run one inside runner.request(name, timesteps)")
        steps = max(self.runner.steps, 1 + max(step for step, _ in self._losses))
        if not 0 <= dense_steps <= steps or weight < 0 or not math.isfinite(weight):
            raise OptionError(
                f"dense_steps = {dense_steps}, weight = {weight}: expected 0 to {steps}, and 0 or more"
            )
        whole = self._tiling.counts
        if weight == 0 and whole in self.candidates:
            raise OptionError(
                f"candidates hold {whole}, the whole grid, and a weight of 0 always chooses it",
                remedy="leave it out, or give density a weight",
            )
        density = torch.tensor([float(window_density(self._tiling, w)) for w in self.candidates])
        windows: dict[str, list[int]] = {}
        for step, layer in sorted(self._losses):
            cost = self.losses(step, layer) + weight * density.double()[:, None]
            for head, best in enumerate(cost.argmin(0).tolist()):
                window = whole if step < dense_steps else self.candidates[best]
                windows[f"{step}_{layer}_{head}"] = list(window)
        return {"fingerprint": {**self._found, "steps": steps}, "windows": windows}

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with torch.no_grad():
                return self._compiled(*args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, TilewrightError):
                raise error.inner_exception from None
            raise

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        program = from_dynamo(gm, example_inputs)
        normalize(program)
        derive_facts(program)
        found = [site for _, site in sites(program) if isinstance(site, VideoAttention)]
        if not found:
            return gm.forward
        if self._found is not None:
            raise CaptureError("the model is captured in parts: a table needs its attentions in one graph")
        tiling = tile_grid(found[0].grid, self.tile, self.nondivisible)
        if tiling is None:
            raise OptionError(f"tile = {self.tile} does not divide the grid {found[0].grid}")
        for window in self.candidates:
            problem = check_window(window, tiling.counts)
            if problem is not None:
                raise OptionError(f"candidate {window}: {problem}")
        self._tiling = tiling
        self._found = {
            "grid": list(found[0].grid),
            "tile": list(self.tile),
            "heads": found[0].heads,
            "layers": program.facts.get("layers") if program.facts.has("layers") else len(found),
            "checkpoint": checkpoint_of(program),
        }
        running = _Measuring(program, self._with_candidates(program, found, tiling), self._add)
        return lambda *given: running.run(*given)

    def _with_candidates(
        self, program: Program, found: list[VideoAttention], tiling: Tiling
    ) -> dict[fx.Node, tuple[VideoAttention, int]]:
        """Put every candidate's attention behind the dense one; what their nodes stand for."""
        constants, marked = Constants(program), dict[fx.Node, tuple[VideoAttention, int]]()
        for site in found:
            text, made = text_blocks(tiling, site.start, site.tokens), list[fx.Node]()
            for number, window in enumerate(self.candidates):
                layout = tile_layout(tiling, site.start, site.tokens, (window,) * site.heads)
                out, _, new = insert_sparse(program, site, with_key_mask(layout, site, text), constants)
                marked[out] = site, number
                made += new
            made[0].prepend(site.node)  # dense first: each candidate is compared and let go at once
        return marked

    def _add(self, site: VideoAttention, number: int, loss: Tensor) -> None:
        key = (self.runner.step, site.where)
        held = self._losses.setdefault(
            key, torch.zeros(len(self.candidates), site.heads, dtype=torch.float64)
        )
        held[number] += loss
        self._calls[key] = self._calls.get(key, 0) + (number == 0)


class _Measuring(fx.Interpreter):
    """Runs a program; of the marked nodes only the difference to the dense output is kept."""

    def __init__(
        self,
        program: Program,
        marked: dict[fx.Node, tuple[VideoAttention, int]],
        add: Callable[[VideoAttention, int, Tensor], None],
    ) -> None:
        super().__init__(program.module, garbage_collect_values=True)
        self._marked, self._add = marked, add

    def run_node(self, n: fx.Node) -> Any:
        if n.target is ops.block_sparse_attention:
            args, _ = self.fetch_args_kwargs_from_env(n)
            return _fastest(args)
        value = super().run_node(n)
        if n not in self._marked:
            return value
        site, number = self._marked[n]
        error = (value.double() - self.env[site.node].double()).square()
        start = site.start
        self._add(site, number, error[:, :, start : start + site.video].mean((0, 2, 3)).cpu())
        return None


def _fastest(args: Sequence[Any]) -> Any:
    """block_sparse_attention by its generated kernel; by its definition where none fits."""
    choice = select_for_node("block_sparse_attention", args, host_target(), training=False)
    if not args[0].is_cpu or not isinstance(choice, KernelChoice):
        return ops.block_sparse_attention(*args)
    given, _ = choice.rewrite_args(args)
    return choice.op(*given)


def convert_windows(
    module: nn.Module, call: Call, path: str, *, tile: Triple, nondivisible: Nondivisible = "error"
) -> dict[str, Any]:
    """A published table, a flat JSON object `{"step_layer_head": [wt, wy, wx]}`, as one for this model.

    call: (args, kwargs) of one forward, which is run to find grid, heads and layers. On what model and
    schedule the table was searched it does not say: that they are these is the caller's word. OptionError
    for a file that is no such table, has holes, other layers or heads than the model, or windows that the
    grid does not take.
    """
    try:
        entries = read_json(path)
        if not isinstance(entries, dict) or not entries:
            raise ValueError('expected {"step_layer_head": [wt, wy, wx], ...}')
        windows = parse_windows(entries)
    except ValueError as error:
        raise OptionError(f"{path}: {error}") from None
    steps, layers, heads = (1 + max(key[i] for key in windows) for i in range(3))
    if len(windows) != steps * layers * heads:
        raise OptionError(f"{path}: {len(windows)} of {steps} x {layers} x {heads} entries are there")
    search = WindowSearch(
        module, tile=tile, candidates=sorted(set(windows.values())), nondivisible=nondivisible
    )
    args, kwargs = call
    with search.runner.request("table", [float("inf")]):
        search.runner(*args, **kwargs)
    found = search.table(weight=1.0)["fingerprint"]
    if (layers, heads) != (found["layers"], found["heads"]):
        raise OptionError(
            f"{path}: {layers} layers of {heads} heads; the model has {found['layers']} of {found['heads']}"
        )
    return {"fingerprint": {**found, "steps": steps}, "windows": dict(entries)}


def density(table: Mapping[str, Any], nondivisible: Nondivisible = "ceil") -> float:
    """What a table keeps of all pairs of video tokens, over its steps, layers and heads."""
    tiling = tile_grid(table["fingerprint"]["grid"], table["fingerprint"]["tile"], nondivisible)
    assert tiling is not None, "only nondivisible=dense gives none"
    counts = Counter(tuple(w) for w in table["windows"].values())
    return sum(n * float(window_density(tiling, w)) for w, n in counts.items()) / counts.total()
