"""Loads the library of a generated operator into this process."""

from __future__ import annotations

from pathlib import Path

import torch

from tilewright.kernels.common.cpp import NAMESPACE


def load_operator(name: str, library: Path) -> None:
    """Register the operator that a library defines, unless the process has it: an exported package and the
    compiler's store both hold it. A name holds a digest of its source, so that equal names are the same.

    To load a second library of one name would end the process: its constructor throws.
    """
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        torch.ops.load_library(str(library.resolve()))  # type: ignore[no-untyped-call]
