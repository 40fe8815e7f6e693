"""Each structural fault of a model file is found before a library reads it, and named in one line."""

from __future__ import annotations

import json
import os
import struct
import zipfile

import pytest

from tilewright.compiler.diagnostics import LoadError
from tilewright.frontends.gguf_check import TYPES, ArrayLength, check_gguf
from tilewright.frontends.loaders import resolve
from tilewright.frontends.model_files import file_inside, parse_json_object
from tilewright.frontends.safetensors_check import check_safetensors, check_weights_folder


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str = "w", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_file(
    pairs: list[bytes], tensors: list[bytes], data: int = 128, *, counts: tuple[int, int] | None = None
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(pairs))))
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


ARRAY, STRING, U32 = 9, 8, 4
NESTED = struct.pack("<IQ", ARRAY, 1) * 6 + struct.pack("<IQ", 0, 0)
GOOD = pair("general.architecture", STRING, text("llama"))
BAD_GGUF: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "magic": (b"GGML" + bytes(60), "'GGML'"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(60), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
    "lying counts": (gguf_file([], [], counts=(2**63, 0)), "announces 9223372036854775808 tensors"),
    "lying pairs": (gguf_file([], [], counts=(0, 2**62)), "metadata pairs"),
    "string length": (gguf_file([struct.pack("<Q", 2**63 - 1) + bytes(40)], []), "announces"),
    "key twice": (gguf_file([GOOD, GOOD], []), "given twice"),
    "key empty": (gguf_file([pair("", U32, bytes(4))], []), "is empty"),
    "key not text": (gguf_file([text(b"\xff\xfe") + struct.pack("<II", U32, 1)], []), "not UTF-8"),
    "value type": (gguf_file([pair("k", 13, bytes(8))], []), "unknown type 13"),
    "bool": (gguf_file([pair("k", 7, b"\x02")], []), "a bool is 2"),
    "array length": (gguf_file([pair("k", ARRAY, struct.pack("<IQ", U32, 2**60))], []), "elements"),
    "array of unknown": (gguf_file([pair("k", ARRAY, struct.pack("<IQ", 77, 3) + bytes(9))], []), "type 77"),
    "array nesting": (gguf_file([pair("k", ARRAY, NESTED)], []), "nests arrays"),
    "alignment 0": (gguf_file([pair("general.alignment", U32, bytes(4))], []), "general.alignment is 0"),
    "alignment 24": (gguf_file([pair("general.alignment", U32, struct.pack("<I", 24))], []), "is 24"),
    "alignment text": (gguf_file([pair("general.alignment", STRING, text("32"))], []), "alignment is '32'"),
    "rank": (gguf_file([], [tensor(dims=(1,) * 5)]), "5 dimensions"),
    "rank 0": (gguf_file([], [tensor(dims=()) + bytes(16)]), "0 dimensions"),
    "dims overflow": (gguf_file([], [tensor(dims=(2**33, 2**33))]), "does not fit"),
    "dim 0": (gguf_file([], [tensor(dims=(0, 4))]), "does not fit"),
    "type": (gguf_file([], [tensor(kind=4)]), "unknown type 4"),
    "block": (gguf_file([], [tensor(dims=(33,), kind=2)]), "not whole Q4_0 blocks of 32"),
    "offset aligned": (gguf_file([], [tensor(offset=8)], 256), "not at a multiple of 32"),
    "offset far": (gguf_file([], [tensor(offset=2**62)]), "does not fit"),
    "truncated": (gguf_file([], [tensor(dims=(32,))], 127), "ends at byte"),
    "overlap": (gguf_file([], [tensor("a", (64,)), tensor("b", (32,), 0, 128)], 512), "overlap"),
    "tensor twice": (gguf_file([], [tensor("a"), tensor("a", offset=128)], 512), "listed twice"),
}


@pytest.mark.parametrize("case", BAD_GGUF)
def test_gguf_faults_are_named(tmp_path, case):
    data, message = BAD_GGUF[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(LoadError) as caught:
        check_gguf(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_good_gguf_is_described(tmp_path, samples):
    path = tmp_path / "m.gguf"
    path.write_bytes(samples.gguf)
    info = check_gguf(path)
    assert info.metadata["general.architecture"] == "llama"
    assert info.metadata["tokenizer.ggml.merges"] == ("a b", "b c")
    assert info.tensors["blk.0.attn_k.weight"].shape == (16, 32)
    assert info.elements == sum(t.size // 4 for t in info.tensors.values())
    long = pair("k", ARRAY, struct.pack("<IQ", U32, 100) + bytes(400))
    path.write_bytes(gguf_file([long], []))
    assert check_gguf(path).metadata == {"k": ArrayLength(100)}


def test_the_type_table_is_that_of_ggml():
    import gguf

    theirs = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: theirs[kind] for kind in TYPES} == TYPES


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS: dict[str, tuple[object, int, str]] = {
    "not json": (b"{not json", 0, "not valid JSON"),
    "list": (b"[1]", 0, "no JSON header"),
    "not utf-8": (b'{"\xff":1}', 0, "not valid JSON"),
    "nan": (b'{"a": NaN}', 0, "NaN"),
    "twice": (b'{"a":1,"a":2}', 0, "given twice"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, "nested"),
    "depth 80": (b'{"a":' + b"[" * 80 + b"]" * 80 + b"}", 0, "nested more than 64"),
    "long number": (b'{"a":' + b"9" * 10_000 + b"}", 0, "not valid JSON"),
    "entry": ({"a": 3}, 0, "exactly dtype, shape"),
    "extra field": ({"a": F32 | {"x": 1}}, 8, "exactly dtype, shape"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    "dtype": ({"a": F32 | {"dtype": "F128"}}, 8, "unknown dtype 'F128'"),
    "dtype list": ({"a": F32 | {"dtype": ["F32"]}}, 8, "unknown dtype"),
    "negative": ({"a": F32 | {"shape": [-2]}}, 8, "illegal shape"),
    "bool": ({"a": F32 | {"shape": [True, 2]}}, 8, "illegal shape"),
    "huge": ({"a": F32 | {"shape": [2**63]}}, 8, "illegal shape"),
    "product": ({"a": F32 | {"shape": [2**40, 2**40]}}, 8, "does not have 8 bytes"),
    "offsets": ({"a": F32 | {"data_offsets": [0]}}, 8, "illegal data_offsets"),
    "reversed": ({"a": F32 | {"data_offsets": [8, 0]}}, 8, "does not have -8 bytes"),
    "size": ({"a": F32 | {"shape": [3]}}, 8, "does not have 8 bytes"),
    "hole": ({"a": F32 | {"data_offsets": [4, 12]}}, 12, "leaves a hole of 4 bytes"),
    "overlap": ({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, 12, "overlaps"),
    "short": ({"a": F32}, 7, "need 8 bytes and it has 7"),
    "trailing": ({"a": F32}, 9, "need 8 bytes and it has 9"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_safetensors_faults_are_named(tmp_path, pack, case):
    header, buffer, message = BAD_HEADERS[case]
    path = tmp_path / "m.safetensors"
    path.write_bytes(pack(header, bytes(buffer)))
    with pytest.raises(LoadError) as caught:
        check_safetensors(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 3])
def test_a_lying_header_length_is_found(tmp_path, length):
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(LoadError, match="announces a header"):
        check_safetensors(path)


def test_good_safetensors_are_described(tmp_path, pack):
    header = {
        "__metadata__": {"format": "pt"},
        "b": F32 | {"data_offsets": [8, 16]},
        "a": F32,
        "e": F32 | {"shape": [0], "data_offsets": [16] * 2},
    }
    path = tmp_path / "m.safetensors"
    path.write_bytes(pack(header, bytes(16)))
    assert {name: t.shape for name, t in check_safetensors(path).items()} == {"a": (2,), "b": (2,), "e": (0,)}


def test_json_must_be_an_object():
    for data in (b"3", b"[]", b"null", b'"x"'):
        with pytest.raises(LoadError, match="not an object"):
            parse_json_object(data, "x")


# ---- S5: names in files stay inside the folder ----

ESCAPES = [
    "../x.safetensors", "/etc/passwd.safetensors", "sub/x.safetensors", "sub/../../x.safetensors", "..", ".",
    "", "a\0b.safetensors", "C:x.safetensors", "a\\b.safetensors", "a.safetensors.", "~x.safetensors",
    "-x.safetensors", "a\n.safetensors", "\u202ea.safetensors", "a b.safetensors",
    "\uff0e\uff0e/x.safetensors",
    "\u00e9.safetensors", "x" * 300 + ".safetensors", "$HOME.safetensors", "%2e%2e.safetensors",
    "|x.safetensors", "x.safetensors/", "//x.safetensors", "./x.safetensors", "x*.safetensors",
    "aux:.safetensors", "\ud800.safetensors", "x.bin", "x.pkl", "x.safetensors.py",
    None, 3, ["x.safetensors"], {"a": 1}, True,
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES, ids=ascii)
def test_shard_names_cannot_leave_the_folder(tmp_path, samples, name):
    (tmp_path / "x.safetensors").write_bytes(samples.safetensors)
    folder = samples.sharded(tmp_path / "m")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    path.write_text(json.dumps(index))
    with pytest.raises(LoadError) as caught:
        check_weights_folder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
@pytest.mark.parametrize("kind", ["link", "hard link", "dangling link", "pipe", "device link", "folder link"])
@pytest.mark.timeout(30)
def test_links_and_pipes_in_a_folder_are_refused(tmp_path, samples, file, kind):
    folder = samples.folder(tmp_path / "m")
    outside = tmp_path / "outside"
    outside.write_bytes((folder / file).read_bytes() if (folder / file).exists() else b"{}")
    (folder / file).unlink(missing_ok=True)
    if kind == "hard link":
        os.link(outside, folder / file)
    elif kind == "pipe":
        os.mkfifo(folder / file)
    else:
        aims = {
            "link": outside,
            "dangling link": tmp_path / "no",
            "device link": "/dev/zero",
            "folder link": tmp_path,
        }
        (folder / file).symlink_to(aims[kind])
    with pytest.raises(LoadError, match="symbolic link|hard links|not a regular file"):
        resolve(str(folder))


def test_an_index_must_agree_with_its_shards(tmp_path, samples):
    folder = samples.sharded(tmp_path / "m")
    assert sorted(map(len, check_weights_folder(folder).values())) == [4, 7]
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for change in ({"ghost": "a.safetensors"}, {sorted(index["weight_map"])[0]: "b.safetensors"}):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        with pytest.raises(LoadError, match="disagrees with"):
            check_weights_folder(folder)


def test_a_bare_name_is_needed(tmp_path):
    (tmp_path / "a").write_text("x")
    assert file_inside(tmp_path, "a") == tmp_path / "a"
    with pytest.raises(LoadError, match="bare file name"):
        file_inside(tmp_path / "sub", "../a")


# ---- formats that are recognised and refused ----


def test_onnx_says_whether_it_is_onnx(tmp_path, samples):
    path = tmp_path / "m.onnx"
    for data, message in [
        (samples.onnx, "is an ONNX model; reading ONNX"),
        (b"", "not an ONNX model: its IR version is 0"),
        (b"PK\x03\x04", "byte 0 does not start a field"),
        (samples.onnx[:-1], "announces"),
        (samples.onnx[:7] + b"\x80" * 12, "not an ONNX model"),
        (samples.gguf, "not an ONNX model"),
        (b"\x08\x0a", "no graph"),
    ]:
        path.write_bytes(data)
        with pytest.raises(LoadError, match=message):
            resolve(str(path))


def test_pt2_says_why_it_is_refused(tmp_path, samples):
    path = tmp_path / "m.pt2"
    for data, message in [
        (samples.pt2, "only read it by unpickling"),
        (b"junk", "not a .pt2 archive"),
        (samples.pt2[:-30], "not a .pt2 archive"),
    ]:
        path.write_bytes(data)
        with pytest.raises(LoadError, match=message):
            resolve(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(LoadError, match="not one of torch.export"):
        resolve(str(path))


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "pkl", "ckpt"])
def test_pickle_files_are_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(b"x")
    with pytest.raises(LoadError, match="pickle file"):
        resolve(str(path))


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/proc/self/mem", "/no/such.gguf", "nul\0.gguf"])
def test_odd_paths_are_one_error(path):
    with pytest.raises(LoadError) as caught:
        resolve(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 10**8}, "parameters"),
        ({"hidden_size": 1 << 30}, "parameters|cannot be read"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"model_type": "no-such-model"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ({"hidden_size": "8; import os"}, "hidden_size|cannot be read"),
        ({"hidden_act": "no_such_function"}, "cannot be read"),
        ({"num_hidden_layers": 2}, "lacks|layers"),
        ({"intermediate_size": 24}, "another shape|cannot be read"),
    ],
    ids=str,
)
def test_a_config_that_lies_about_the_weights(tmp_path, samples, change, message):
    folder = samples.folder(tmp_path / "m", **change)
    with pytest.raises(LoadError, match=message):
        resolve(str(folder))
