"""What an export or its reader must refuse with one line, and leave nothing behind."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import tilewright as tw
from tilewright.compiler.diagnostics import ExportError, LoadError
from tilewright.frontends.cli import main
from tilewright.frontends.export.artifact import new_artifact
from tilewright.frontends.export.onnx_check import check_external_data
from tilewright.frontends.export.onnx_file import session

CALL = (torch.randn(3, 70),)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond `size` bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_while_weights_are_written(tmp_path: Path) -> None:
    with files_up_to(8192), pytest.raises(ExportError, match="cannot be written: file too large") as refused:
        tw.export(nn.Linear(70, 50), CALL, "exact", tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", ["writing ONNX", "checking in onnxruntime"])
def test_an_interrupted_export_leaves_nothing(tmp_path: Path, at: str) -> None:
    steps = list[str]()

    @contextmanager
    def progress(what: str) -> Iterator[None]:
        steps.append(what)
        yield
        if at in what:
            assert any(tmp_path.iterdir()), "there must be something to remove"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tw.export(nn.Linear(7, 5), (torch.randn(3, 7),), "exact", tmp_path / "out", progress=progress)
    assert at in steps[-1]
    assert list(tmp_path.iterdir()) == []


def outside(**place: str) -> TensorProto:
    """float32 [2] whose data lie where `place` says."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def as_initializer(tensor: TensorProto) -> onnx.ModelProto:
    return built([helper.make_node("Add", ["x", "w"], ["y"])], [tensor])


def as_constant(tensor: TensorProto) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Constant", [], ["w"], value=tensor),
        helper.make_node("Add", ["x", "w"], ["y"]),
    ]
    return built(nodes, [])


def as_branch(tensor: TensorProto) -> onnx.ModelProto:
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])
    branch = helper.make_graph([helper.make_node("Identity", ["w"], ["z"])], "b", [], [out], [tensor])
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    chosen = helper.make_node("If", ["yes"], ["c"], then_branch=branch, else_branch=branch)
    return built([chosen, helper.make_node("Add", ["x", "c"], ["y"])], [yes])


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    body = [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["x", "w"], ["y"])]
    made = helper.make_function("own", "F", ["x"], ["y"], body, [helper.make_opsetid("", 23)])
    return built([helper.make_node("F", ["x"], ["y"], domain="own")], [], [made])


def built(nodes: list, weights: list, functions: list = ()) -> onnx.ModelProto:  # type: ignore[assignment]
    given, made = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
    graph = helper.make_graph(nodes, "g", [given], [made], weights)
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=11, functions=functions)


def laid_out(folder: Path, model: onnx.ModelProto) -> Path:
    """The model in a folder with 8 bytes of weights, links out of it and a secret beside it."""
    (folder.parent / "secret").write_bytes(bytes(8))
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.data").write_bytes(bytes(8))
    (folder / "link").symlink_to("../secret")
    (folder / "up").symlink_to("..")
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


@pytest.mark.parametrize("form", [as_initializer, as_constant, as_branch, in_function])
def test_data_outside_the_folder_wherever_the_tensor_stands(
    tmp_path: Path, form: Callable[[TensorProto], onnx.ModelProto]
) -> None:
    check_external_data(laid_out(tmp_path / "good", form(outside(location="weights.data"))))
    path = laid_out(tmp_path / "bad", form(outside(location="../secret")))
    with pytest.raises(LoadError, match="tensor 'w' would be read from '../secret', outside its folder"):
        check_external_data(path)
    with pytest.raises(LoadError, match="outside its folder"):
        session(path)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ({"location": "/etc/passwd"}, "outside its folder"),
        ({"location": "sub/../../secret"}, "outside its folder"),
        ({"location": "..\\secret"}, "outside its folder"),
        ({}, "outside its folder"),
        ({"location": "link"}, "through the link"),
        ({"location": "up/secret"}, "through the link"),
        ({"location": "absent"}, "has no place"),
        ({"location": "sub"}, "has no place"),
        ({"location": "weights.data", "offset": "4", "length": "8"}, "has no place"),
        ({"location": "weights.data", "offset": "-4"}, "has no place"),
        ({"location": "weights.data", "length": "eight"}, "has no place"),
    ],
)
def test_places_that_no_export_writes(tmp_path: Path, place: dict[str, str], reason: str) -> None:
    with pytest.raises(LoadError, match=reason) as refused:
        check_external_data(laid_out(tmp_path / "bad", as_initializer(outside(**place))))
    assert "\n" not in str(refused.value)


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(LoadError, match="not an ONNX model"):
        check_external_data(tmp_path / "m.onnx")


def test_verify_sees_data_outside_a_whole_artifact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_bytes(bytes(8))
    with new_artifact(tmp_path / "out") as made:
        made.write("call.onnx", as_initializer(outside(location="../secret")).SerializeToString())
        made.finish({"kind": "onnx", "entries": [{"name": "call", "file": "call.onnx"}]})
    assert main(["verify", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert "outside its folder" in shown
    assert shown.count("\n") == 1
