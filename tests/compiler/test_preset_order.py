"""A preset's passes stand at their stage; passes written by hand must be in order."""

from __future__ import annotations

import pytest

from tilewright.compiler.diagnostics import PipelineError
from tilewright.compiler.pipeline import Pipeline


def test_a_preset_makes_room_for_weight_passes() -> None:
    mixed = Pipeline.parse("exact,quantize-linear{weight=int8}")
    names = [p.name for p in mixed.passes]
    assert names.index("dead-code") < names.index("quantize-linear") < names.index("fuse-projections")
    assert names == [p.name for p in Pipeline.parse("quantize-linear,exact").passes]
    assert Pipeline.parse(mixed.text()) == mixed


def test_order_written_by_hand_is_still_checked() -> None:
    with pytest.raises(PipelineError, match="quantize-linear .* stands after fuse-projections"):
        Pipeline.parse("exact,fuse-projections,quantize-linear")
