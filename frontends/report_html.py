"""The HTML view of a report: one file that needs nothing else, opens offline and runs no code but its own."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import tempfile
from importlib import resources
from pathlib import Path

from tilewright.compiler.diagnostics import TilewrightError
from tilewright.compiler.report import Report
from tilewright.compiler.whole_file import written_whole
from tilewright.frontends.report_data import page_data

_SCRIPTS = ("base.js", "passes.js", "nodes.js", "graph.js", "page.js")


class ReportError(TilewrightError):
    """A report file cannot be written: names the path and the reason."""


def write_html(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write the report as one self-contained HTML file; the file at `path` is old and whole or new and whole.

    ReportError when the folder is absent or not writable.
    """
    target = Path(path)
    text = page(report)
    try:
        with written_whole(target) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(target, error) from error
    return target


def check_writable(path: str | os.PathLike[str]) -> None:
    """ReportError when a report could not be written to `path`; made for asking before the work begins."""
    target = Path(path)
    if target.is_dir():
        raise _unwritable(target, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> ReportError:
    return ReportError(
        f"the report cannot be written: {error.strerror}",
        where=str(target),
        remedy="name a file in a folder that exists and that you may write to",
    )


def page(report: Report) -> str:
    """The whole page as text. Only this page's own script and style run: the policy names their hashes."""
    style = _part("style.css")
    script = "".join(_part(name) for name in _SCRIPTS)
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"POLICY": policy, "STYLE": style, "DATA": embedded(page_data(report)), "SCRIPT": script}
    text = _part("page.html")
    pieces = []
    for name, value in parts.items():
        before, _, text = text.partition(f"<!--{name}-->")
        pieces += [before, value]
    return "".join([*pieces, text])


def embedded(data: object) -> str:
    """JSON for a script element: ASCII only, and no character that HTML gives a meaning to."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _part(name: str) -> str:
    folder = resources.files("tilewright.frontends").joinpath("report_page")
    return folder.joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
