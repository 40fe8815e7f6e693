"""A trained policy of early exits: one logistic classifier per exit, in a JSON file with the fingerprint of
the model it was trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tilewright.compiler.calibration import fingerprint
from tilewright.compiler.diagnostics import FactError, LoadError
from tilewright.compiler.program import Program
from tilewright.compiler.whole_file import written_whole

FORMAT = "tilewright-exit-policy-1"
_MAX_BYTES = 64 << 20


@dataclass
class ExitPolicy:
    """What lets a token leave behind each of some layers."""

    fingerprint: str
    exits: list[int]
    """Numbers of layers, ascending."""
    weight: Tensor
    """float32 [exits, C + 2], over `exit_scores.features`."""
    bias: Tensor
    """float32 [exits]."""
    source: str = ""
    """What it was trained on."""

    def check(self, program: Program, exits: list[int]) -> None:
        """FactError when this policy is of another model or of other exits."""
        here = fingerprint(program)
        if self.fingerprint != here:
            raise FactError(
                f"the exit policy is of another model: fingerprint {self.fingerprint[:12]}, here {here[:12]}",
                remedy="train one for this model",
            )
        if self.exits != exits:
            raise FactError(
                f"the exit policy was trained for exits {self.exits}, the pass has {exits}",
                remedy="name the exits it was trained for",
            )

    def save(self, path: Path) -> None:
        """Write one JSON file, complete or not at all."""
        rows = {"weight": self.weight.tolist(), "bias": self.bias.tolist()}
        given = {"fingerprint": self.fingerprint, "exits": self.exits, "source": self.source}
        with written_whole(path) as file:
            file.write_text(json.dumps({"format": FORMAT, **given, **rows}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ExitPolicy:
        """Read a file that `save` wrote; LoadError names what is wrong with any other."""
        where = str(path)
        try:
            if Path(path).stat().st_size > _MAX_BYTES:
                raise LoadError(f"is larger than {_MAX_BYTES} bytes", where=where)
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
                raise LoadError("holds no exit policy", where=where, remedy="train one")
            for name in ("weight", "bias"):
                data[name] = torch.tensor(data[name], dtype=torch.float32)
            found = cls(**data)
            exits, weight, bias = found.exits, found.weight, found.bias
            if not (isinstance(exits, list) and all(type(n) is int for n in exits) and exits):
                raise ValueError("exits are no list of numbers")
            if weight.dim() != 2 or bias.shape != (len(exits),) or len(weight) != len(exits):
                raise ValueError(f"{tuple(weight.shape)} weights for {len(exits)} exits")
            if not (weight.isfinite().all() and bias.isfinite().all()):
                raise ValueError("a weight is no finite number")
            return found
        except OSError as error:
            raise LoadError(f"cannot be read: {error.strerror or error}", where=where) from error
        except (ValueError, TypeError, KeyError) as error:
            raise LoadError(f"is damaged: {error}", where=where) from error
