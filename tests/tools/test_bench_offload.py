"""The bookkeeping of the offload bench: which bandwidth carries a step's bytes in time."""

from __future__ import annotations

import pytest

from tilewright.tools.bench_offload import hideable


def test_equal_layers_need_the_bytes_of_a_layer_in_its_time() -> None:
    assert hideable(dict.fromkeys(range(8), 100.0), (1,), 8, 0.5) == 200.0


def test_a_layer_has_the_time_since_its_choice() -> None:
    assert hideable({7: 600.0}, (1,), 8, 1.0) == pytest.approx(100.0)
    assert hideable({3: 600.0}, (1,), 8, 1.0) == pytest.approx(300.0)
    assert hideable({3: 600.0}, (1, 3), 8, 1.0) == pytest.approx(600.0), "a layer that chooses"
    assert hideable({6: 300.0, 7: 600.0}, (1,), 8, 1.0) == pytest.approx(150.0), "both in one link"
