"""The table of passes in the README, generated from the passes themselves: `python -m
tilewright.tools.catalogue`."""

from __future__ import annotations

import sys
from pathlib import Path

from tilewright.compiler import registry
from tilewright.frontends.commands.passes import describe

BEGIN, END = "<!-- passes: generated, do not edit -->", "<!-- end of passes -->"
README = Path(__file__).resolve().parent.parent / "README.md"


def table() -> str:
    """The passes as a Markdown table."""
    rows = ["| pass | stage | exactness | what it does | options |", "|---|---|---|---|---|"]
    for cls in registry.load_all().values():
        if not cls.__module__.startswith(registry.ROOT_PACKAGE):
            continue
        d = describe(cls)
        options = ", ".join(f"`{o['name']}={o['default']}`" for o in d["options"]) or "none"
        rows.append(f"| `{d['name']}` | {d['stage']} | {d['exactness']} | {d['summary']} | {options} |")
    return "\n".join(rows)


def updated(text: str) -> str:
    """The README text with a fresh table between its marks."""
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END, 1)[1]}"


def main() -> int:
    text = README.read_text(encoding="utf-8")
    fresh = updated(text)
    if fresh == text:
        return 0
    if "--check" in sys.argv:
        print("README.md: the table of passes is out of date; run python -m tilewright.tools.catalogue")
        return 1
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
