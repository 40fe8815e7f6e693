"""The import table of the design: an arrow may only point left."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "runtime": {"runtime"},
    "compiler": {"compiler", "runtime.contracts"},
    "passes": {"passes", "compiler"},
    "kernels": {"kernels", "compiler", "runtime"},
    "frontends": {"frontends", "passes", "kernels", "compiler", "runtime"},
    "tools": {"tools", "frontends", "passes", "kernels", "compiler", "runtime"},
}


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            names += [f"{node.module}.{a.name}" for a in node.names]
    return [n.removeprefix("tilewright.") for n in names if n.startswith("tilewright.")]


def is_allowed(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed) or name == "__version__"


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_point_left(layer: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / layer).rglob("*.py"))
        for name in imported(path)
        if not is_allowed(name, MAY_IMPORT[layer])
    ]
    assert not wrong


def test_a_wrong_import_is_found() -> None:
    assert not is_allowed("kernels.table", MAY_IMPORT["compiler"])
    assert not is_allowed("runtime.store", MAY_IMPORT["compiler"])
    assert is_allowed("runtime.contracts.Refusal", MAY_IMPORT["compiler"])


def test_bare_layer_names_are_never_imported() -> None:
    for layer in MAY_IMPORT:
        for path in sorted((ROOT / layer).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                module = getattr(node, "module", None) if isinstance(node, ast.ImportFrom) else None
                assert module is None or module.split(".")[0] not in MAY_IMPORT, f"{path} imports {module}"
