"""What the passes over video self-attention share: which layers they take, how they say no, the loop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from tilewright.compiler import GraphPass, PassLog, Program, ops
from tilewright.compiler.diagnostics import FactError
from tilewright.passes.attention._sites import Mismatch, VideoAttention, sites
from tilewright.passes.attention._sparse_call import Constants


@dataclass(frozen=True, kw_only=True)
class VideoAttentionPass(GraphPass):
    """Base: `plan` decides for one attention, `rewrite` replaces it."""

    layers: tuple[int, ...] = ()
    """Only these layers; none given means all."""
    dense_layers: tuple[int, ...] = ()
    """Layers left dense."""
    min_tokens: int = 0
    """Fewer video tokens than this stay dense."""
    on_mismatch: Literal["dense", "error"] = "dense"
    """What an attention whose grid or text is unknown or does not fit means: leave it dense, or an error."""

    def validate(self) -> None:
        for name in ("layers", "dense_layers"):
            if any(layer < 0 for layer in getattr(self, name)):
                raise self.option_error(name, "layers are counted from 0")
        if self.min_tokens < 0:
            raise self.option_error("min_tokens", "expected 0 or more")

    def steps(self) -> Mapping[int, Hashable]:
        """The denoising steps that the option `step` chooses from, with what tells one from another.

        None where all steps are alike.
        """
        return {}

    @abstractmethod
    def plan(self, program: Program, site: VideoAttention) -> Any:
        """What to do with one attention; a text is the reason to leave it dense."""

    @abstractmethod
    def rewrite(
        self, program: Program, site: VideoAttention, plan: Any, constants: Constants
    ) -> tuple[fx.Node, list[fx.Node], str]:
        """Insert what replaces the attention: (its output, all nodes made, the rule's name in the report)."""

    def sparsify(self, program: Program, log: PassLog) -> None:
        """Every video self-attention of the program, in graph order."""
        constants = Constants(program)
        self._refuse_taken(program, log)
        for node, site in sites(program):
            if not isinstance(site, VideoAttention):
                if isinstance(site, Mismatch) and self.on_mismatch == "error":
                    raise FactError(
                        f"{self.name}: {node.name}: {site}", remedy="give the facts, or on_mismatch=dense"
                    )
                log.refused(node, str(site))
                continue
            plan = self._left_out(site) or self.plan(program, site)
            if isinstance(plan, str):
                log.refused(node, plan)
            elif log.take(node):
                self._replace(program, site, plan, constants, log)
        log.finish(("tilewright::attention",))

    def _refuse_taken(self, program: Program, log: PassLog) -> None:
        """Say which attentions have a layout of another pass: two layouts of one are not a third."""
        for node in program.graph.nodes:
            owner = node.meta.get("tw_slots", {}).get("attention.layout", self.name)
            if (
                node.op == "call_function"
                and node.target is ops.block_sparse_attention
                and owner != self.name
            ):
                log.refused(node, f"{owner} gave it a layout already: an attention has one")

    def _left_out(self, site: VideoAttention) -> str | None:
        if (self.layers and site.where not in self.layers) or site.where in self.dense_layers:
            return f"layer {site.where} is left dense by option"
        if site.video < self.min_tokens:
            return f"{site.video} video tokens, fewer than min_tokens = {self.min_tokens}"
        return None

    def _replace(
        self, program: Program, site: VideoAttention, plan: Any, constants: Constants, log: PassLog
    ) -> None:
        node = site.node
        out, made, rule = self.rewrite(program, site, plan, constants)
        for new in made:
            new.meta["rewritten_by"] = (*node.meta.get("rewritten_by", ()), self.name)
        log.claim_slots([node], {new: new for new in made})
        log.applied(node, rule=rule, inserted=made, removed=[node])
        node.replace_all_uses_with(out)
        program.graph.erase_node(node)
