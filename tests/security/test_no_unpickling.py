"""S1: nothing in the tree unpickles or evaluates what it reads; pickle bombs in every place do not go off."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tilewright.compiler.diagnostics import LoadError
from tilewright.frontends.loaders import resolve
from tilewright.runtime.store import ArtifactStore

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("compiler", "passes", "runtime", "kernels", "frontends", "tools", "tilewright")
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
CALLS = {"eval", "exec", "__import__", "execfile"}
ATTRIBUTES = {
    ("os", "system"), ("os", "popen"), ("torch", "_pickle_load"), ("yaml", "load"), ("yaml", "unsafe_load"),
    ("sympy", "sympify"), ("sympy", "parse_expr"), ("pd", "read_pickle"), ("pandas", "read_pickle"),
    ("pkgutil", "resolve_name"), ("torch", "load"), ("np", "load"), ("numpy", "load"),
}  # fmt: skip
KEYWORDS = {"shell", "allow_pickle", "trust_remote_code", "use_pickle"}


def faults(source: str, name: str) -> Iterator[str]:
    """Each place of `source` that could run what it reads, as `name:line: what`."""
    for node in ast.walk(ast.parse(source)):
        line = f"{name}:{getattr(node, 'lineno', 0)}:"
        if isinstance(node, ast.Import):
            yield from (f"{line} import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES)
        if isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in MODULES:
                yield f"{line} from {node.module} import"
            pairs = ((node.module or "", a.name) for a in node.names)
            yield from (f"{line} from {m} import {n}" for m, n in pairs if (m, n) in ATTRIBUTES)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in MODULES:
            yield f"{line} {node.value.id}.{node.attr}"
        if isinstance(node, ast.Call):
            yield from (f"{line} {what}" for what in _call_faults(node))


def _call_faults(call: ast.Call) -> Iterator[str]:
    keywords = {k.arg: k.value for k in call.keywords}
    completion = ast.unparse(call.func) == "shtab.complete"  # its `shell` is a name: bash, zsh or tcsh
    for keyword in KEYWORDS & set(keywords) - ({"shell"} if completion else set()):
        value = keywords[keyword]
        if not (isinstance(value, ast.Constant) and value.value is False):
            yield f"{keyword}={ast.unparse(value)}"
    if isinstance(call.func, ast.Name) and call.func.id in CALLS:
        yield f"{call.func.id}()"
    if isinstance(call.func, ast.Attribute):
        owner, name = ast.unparse(call.func.value), call.func.attr
        if (owner, name) == ("torch", "load"):
            only = keywords.get("weights_only")
            if not (isinstance(only, ast.Constant) and only.value is True):
                yield "torch.load without weights_only=True"
        elif (owner, name) in {("np", "load"), ("numpy", "load")}:
            return  # without allow_pickle it refuses pickles
        elif (owner, name) in ATTRIBUTES or owner == "builtins" and name in CALLS:
            yield f"{owner}.{name}()"


def test_the_tree_neither_unpickles_nor_evaluates():
    files = [path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")]
    assert len(files) > 20
    found = [
        f for path in files for f in faults(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "import marshal as m", "from pickle import loads", "import shelve",
        "pickle.loads(x)",
        "eval(text)", "exec(text)", "builtins.eval(x)", "__import__(name)", "os.system(x)",
        "from os import system", "torch.load(f)", "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)", "np.load(f, allow_pickle=True)", "subprocess.run(x, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "f(shell=flag)", "sympy.sympify(text)",
        "from torch import load",
    ],
)  # fmt: skip
def test_the_check_sees(line):
    assert list(faults(line, "x")) != []


@pytest.mark.parametrize(
    "line", ["model.eval()", "torch.load(f, weights_only=True)", "np.load(f)", "f(shell=False)"]
)
def test_the_check_lets_pass(line):
    assert list(faults(line, "x")) == []


# ---- bombs ----


class Bomb:
    """Reduces to a call of `function(*arguments)`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def bombs(canary: Path) -> dict[str, bytes]:
    """Twelve payloads, each of which creates `canary` when it is unpickled."""
    command = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    q = repr(command).encode()
    stack = b"\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)]) + command.encode() + b"\x85R"
    nested = pickle.dumps(Bomb(os.system, command))
    buffered = io.BytesIO()
    with zipfile.ZipFile(buffered, "w") as archive:
        archive.writestr("archive/data.pkl", nested)
        archive.writestr("archive/version", "3\n")
    return {
        "classic": b"cos\nsystem\n(S" + q + b"\ntR.",
        "reduce": pickle.dumps(Bomb(os.system, command), protocol=2),
        "stack global": b"\x80\x04" + stack + b".",
        "hidden by pop": b"\x80\x04" + stack + b"0}.",
        "instance": b"(S" + q + b"\nios\nsystem\n.",
        "object": b"(cos\nsystem\nS" + q + b"\no.",
        "exec": pickle.dumps(Bomb(exec, code)),
        "eval": pickle.dumps(Bomb(eval, code)),
        "pkgutil": b"\x80\x04\x8c\x07pkgutil\x8c\x0cresolve_name\x93\x8c\x09os:system\x85R\x8c"
        + bytes([len(command)]) + command.encode() + b"\x85R.",
        "subprocess": pickle.dumps(Bomb(subprocess.check_call, ["touch", str(canary)])),
        "nested": pickle.dumps(Bomb(pickle.loads, nested)),
        "torch archive": buffered.getvalue(),
    }  # fmt: skip


NAMES = sorted(bombs(Path("x")))
PLACES = [
    "m.pt", "m.bin", "m.gguf", "m.safetensors", "m.onnx", "m.pt2", "pt2 inside", "folder/pytorch_model.bin",
    "folder/model.safetensors", "folder/config.json", "folder/tokenizer.json", "folder/tokenizer.model",
    "folder/generation_config.json", "weights=",
]  # fmt: skip


def test_there_are_twelve_live_bombs(tmp_path):
    """Otherwise the canary below would prove nothing."""
    assert len(NAMES) == 12
    for name in NAMES:
        canary = tmp_path / name.replace(" ", "-")
        payload = bombs(canary)[name]
        if name == "torch archive":
            import torch

            torch.load(io.BytesIO(payload), weights_only=False)
        else:
            pickle.loads(payload)
        assert canary.exists(), name


@pytest.mark.parametrize("place", PLACES)
def test_bombs_in_model_files_never_run(tmp_path, samples, make_pt2, canary, place):
    for number, payload in enumerate(bombs(canary).values()):
        base = tmp_path / str(number)
        base.mkdir()
        weights = None
        if place.startswith("folder/"):
            model = samples.folder(base / "m")
            if place == "folder/pytorch_model.bin":
                (model / "model.safetensors").unlink()
            (model / place.removeprefix("folder/")).write_bytes(payload)
        elif place == "weights=":
            model, weights = "tiny-llama", str(base / "w.safetensors")
            Path(weights).write_bytes(payload)
        elif place == "pt2 inside":
            model = base / "m.pt2"
            model.write_bytes(make_pt2(payload=payload))
        else:
            model = base / place
            model.write_bytes(payload)
        with pytest.raises(LoadError):
            resolve(str(model), weights=weights)
        assert not canary.exists()


def test_bombs_in_the_store_never_run(tmp_path, canary):
    store = ArtifactStore(tmp_path / "store")
    key = {"n": "1"}
    for payload in bombs(canary).values():
        for name in ("manifest.json", "manifest.mac", "a"):
            folder = store.get_or_build(key, lambda f: (f / "a").write_bytes(b"good") and None)
            (folder / name).write_bytes(payload)
            again = store.get_or_build(key, lambda f: (f / "a").write_bytes(b"good") and None)
            assert (again / "a").read_bytes() == b"good"
            assert not canary.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_model_never_runs(tmp_path, samples, canary, file):
    """`auto_map` names Python files of the folder; transformers runs them when it is told to trust."""
    folder = samples.folder(tmp_path / "m")
    code = f"open({str(canary)!r}, 'w').close()\nclass Evil:\n    pass\n"
    (folder / "evil.py").write_text(code)
    (folder / "sitecustomize.py").write_text(code)
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    auto_map = {name: "evil.Evil" for name in names} | {"AutoTokenizer": ["evil.Evil", None]}
    path = folder / file
    entries = json.loads(path.read_text()) if path.exists() else {"tokenizer_class": "Evil"}
    path.write_text(json.dumps(entries | {"auto_map": auto_map}))
    if file == "config.json":
        assert resolve(str(folder)).kind == "causal-lm"  # a known architecture needs no code
        path.write_text(json.dumps(entries | {"auto_map": auto_map, "model_type": "evil"}))
    with pytest.raises(LoadError):
        resolve(str(folder))
    assert not canary.exists()
    assert str(folder) not in sys.path


def test_a_config_cannot_choose_kernels_or_other_files(tmp_path, samples, canary):
    """Entries of config.json that transformers would follow to the network or to other files are dropped."""
    (tmp_path / "other.bin").write_bytes(bombs(canary)["reduce"])
    folder = samples.folder(
        tmp_path / "m",
        attn_implementation="evil-org/evil-kernel",
        _attn_implementation="evil-org/evil-kernel",
        experts_implementation="evil-org/evil-kernel",
        kernel_config={"kernel_mapping": {"RMSNorm": "evil-org/evil:RMSNorm"}},
        transformers_weights="../other.bin",
        fusion_config={"x": True},
    )
    loaded = resolve(str(folder))
    assert loaded.module.config._attn_implementation == "sdpa"
    assert not canary.exists()
