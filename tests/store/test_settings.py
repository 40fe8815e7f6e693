"""The environment: typed values, unknown names refused, one line of text each."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.runtime.settings import PREFIX, VARIABLES, Settings, SettingsError, read_settings


def test_nothing_set_gives_the_defaults():
    assert read_settings({"PATH": "/bin"}) == Settings()


def test_values_are_typed():
    got = read_settings(
        {
            "TILEWRIGHT_CACHE": "/x/y",
            "TILEWRIGHT_DUMP": "dumps",
            "TILEWRIGHT_FUEL": "12",
            "TILEWRIGHT_WHY": "rotate-hadamard, quantize-linear",
        }
    )
    assert got == Settings(Path("/x/y"), Path.cwd() / "dumps", 12, ("rotate-hadamard", "quantize-linear"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FUEL", "many"), ("FUEL", "-1"), ("FUEL", ""), ("FUEL", "1e3"), ("FUEL", "1" * 30), ("FUEL", "٣"),
        ("WHY", ""), ("WHY", "a,,b"), ("WHY", "Not A Pass"), ("WHY", "../x"),
        ("CACHE", ""), ("DUMP", ""),
    ],
)  # fmt: skip
def test_an_illegal_value_names_variable_value_and_range(name, value):
    with pytest.raises(SettingsError) as caught:
        read_settings({PREFIX + name: value})
    text = str(caught.value)
    (variable,) = [v for v in VARIABLES if v.name == PREFIX + name]
    assert variable.name in text
    assert repr(value[:80]) in text
    assert variable.allowed in text
    assert "\n" not in text


def test_an_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(
        SettingsError, match="unknown environment variable 'TILEWRIGHT_FEUL'.*did you mean TILEWRIGHT_FUEL"
    ):
        read_settings({"TILEWRIGHT_FEUL": "3"})
    with pytest.raises(SettingsError, match="known variables: TILEWRIGHT_CACHE"):
        read_settings({"TILEWRIGHT_QQQQQQQQQQQQQQQQQQQQQQ": "3"})


def test_every_variable_has_a_field_and_the_reverse():
    assert {v.name for v in VARIABLES} == {PREFIX + f.name.upper() for f in dataclasses.fields(Settings)}


def test_store_and_settings_need_no_torch():
    code = (
        "import sys, tilewright.runtime.store, tilewright.runtime.settings; sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0
