"""Line budgets: 400 lines a file, 60 a function, 150 a pass. Exceptions are named here with their reason."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("compiler", "passes", "runtime", "kernels", "frontends", "tools")
MAX_FILE, MAX_FUNCTION, MAX_PASS = 400, 60, 150

_TABLE = "a table of configurations: one entry after the other, no control flow"
EXCEPTIONS: dict[str, str] = {
    "tools/zoo_decoders.py:layer_norm_like": _TABLE,
    "tools/zoo_encoders.py:encoders": _TABLE,
    "tools/zoo_encoders.py:encoder_decoders": _TABLE,
    "tools/zoo_state_space.py:entries": _TABLE,
    "kernels/linear/cpp.py:_walk": "one C++ loop nest as text; cutting it would hide its shape",
    "kernels/linear/cpp.py:_run": "one C++ function as text; cutting it would hide its shape",
    "kernels/rms_norm/cpp.py:_row_function": "one C++ function as text; cutting it would hide its shape",
    "kernels/rms_norm/cpp.py:_run": "one C++ function as text; cutting it would hide its shape",
    "passes/normalize/match_attention.py": "nine spellings of attention and an example of every refusal",
    "passes/normalize/match_rope.py": "eight spellings of rotary embedding and an example of every refusal",
    "passes/normalize/match_rope.py:examples": _TABLE,
    "passes/weights/rotate_hadamard.py": "four rotations, each with its examples and refusals",
}
"""`path` or `path:function` -> why it may be longer."""


def problems() -> list[str]:
    """One line per file or function over its budget."""
    found = []
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            text = path.read_text(encoding="utf-8")
            lines = text.count("\n")
            limit = MAX_PASS if layer == "passes" and _is_pass(path) else MAX_FILE
            if lines > limit and name not in EXCEPTIONS:
                found.append(f"{name}: {lines} lines, at most {limit}")
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    size = (node.end_lineno or node.lineno) - node.lineno + 1
                    if size > MAX_FUNCTION and f"{name}:{node.name}" not in EXCEPTIONS:
                        found.append(
                            f"{name}:{node.lineno} {node.name}: {size} lines, at most {MAX_FUNCTION}"
                        )
    return found


def _is_pass(path: Path) -> bool:
    return not path.stem.startswith("_") and path.stem != "presets"


def main() -> int:
    found = problems()
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
