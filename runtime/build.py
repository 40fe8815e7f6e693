"""Builds generated C++ into a shared library: sources side by side, flags from an allow list."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tilewright.runtime.store import ArtifactStore

SOURCE, LIBRARY = "kernel.cpp", "kernel.so"
TORCH_LIBRARY = "libtorch_cpu.so"
"""What a kernel finds torch's C ABI in when it is loaded."""
ARCH_FLAGS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"),
}
"""Instruction-set flags by target arch: the only flags that vary."""
COMMON_FLAGS = (
    "-std=c++20",
    "-O3",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",
)
SEARCH_PATHS = ("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX")
"""Environment variables that change what the compiler reads or runs; those that are set are in the key."""
TIMEOUT_SECONDS = 300


class CompileFailed(RuntimeError):
    """The C++ compiler is absent or refused the source; the text is one line with the first complaint."""


@functools.lru_cache(maxsize=1)
def find_compiler() -> tuple[str, str]:
    """(absolute path, version line) of the C++ compiler: $CXX when set, else g++, else c++."""
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("g++", "c++"):
        path = shutil.which(name)
        if path is not None:
            done = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=60, check=False
            )
            if done.returncode == 0:
                return path, done.stdout.splitlines()[0]
    raise CompileFailed(f"no C++ compiler found (looked for {asked or 'g++, c++'}); install g++ or set CXX")


def compile_flags(arch: str) -> tuple[str, ...]:
    """Every flag for one target arch but the paths."""
    if arch not in ARCH_FLAGS:
        raise CompileFailed(f"arch {arch!r} is not one of {', '.join(ARCH_FLAGS)}")
    return (*COMMON_FLAGS, *ARCH_FLAGS[arch])


def compile_cpp(source: str, arch: str, headers: Mapping[str, str]) -> Path:
    """Compile one generated file for `arch` and return the folder that holds `kernel.cpp` and `kernel.so`.

    `headers` holds the text of the files it includes by name. The folder is content-addressed over source,
    headers, flags, compiler, its search paths and torch version, so equal source is built once per machine.
    CompileFailed carries the compiler's first complaint.
    """
    paths = (f"-I{Path(torch.__file__).parent / 'include'}", *_needs_torch())
    identity = {"kind": "cpp-kernel", "source": source, "torch": str(torch.__version__)}
    return _compile(identity, {SOURCE: source}, arch, headers, paths)


def begin_cpp(sources: Iterable[str], arch: str, headers: Mapping[str, str]) -> None:
    """Start to compile generated files, the longest first on every core, and return: `compile_cpp` waits for
    what is under way, and tells what the compiler refuses."""
    with_all = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="tilewright-compile")
    for source in sorted(dict.fromkeys(sources), key=len, reverse=True):
        with_all.submit(compile_cpp, source, arch, headers)
    with_all.shutdown(wait=False)


def compile_library(sources: Mapping[str, str], arch: str, headers: Mapping[str, str]) -> Path:
    """Compile several generated files into one library without torch; as `compile_cpp` otherwise."""
    identity = {"kind": "cpp-library", **{f"source {name}": text for name, text in sources.items()}}
    return _compile(identity, sources, arch, headers, ())


def _needs_torch() -> tuple[str, ...]:
    """Flags that make a library need torch's, by way of an empty one of that name: the linker would read all
    symbols of the real one, which takes it longer than to link a kernel."""
    compiler, version = find_compiler()
    command = [compiler, "-shared", "-nostdlib", f"-Wl,-soname,{TORCH_LIBRARY}", "-x", "c++", os.devnull]
    folder = ArtifactStore.default().get_or_build(
        {"kind": "cpp-stand-in", "library": TORCH_LIBRARY, "compiler": version, **_environment()},
        lambda folder: _run(folder, [*command, "-o", TORCH_LIBRARY]),
    )
    # Where needed libraries are linked only for the symbols they have, an empty one would be left out.
    return (f"-L{folder}", "-Wl,--push-state,--no-as-needed", "-ltorch_cpu", "-Wl,--pop-state")


def _environment() -> dict[str, str]:
    return {f"environment {name}": os.environ[name] for name in SEARCH_PATHS if name in os.environ}


def _compile(
    identity: Mapping[str, str],
    sources: Mapping[str, str],
    arch: str,
    headers: Mapping[str, str],
    paths: tuple[str, ...],
) -> Path:
    compiler, version = find_compiler()
    flags = compile_flags(arch)
    key = {
        **identity,
        **{f"header {name}": text for name, text in headers.items()},
        "flags": " ".join(flags),
        "compiler": version,
        **_environment(),
    }
    return ArtifactStore.default().get_or_build(
        key, lambda folder: _build(folder, sources, headers, [compiler, *flags], paths)
    )


def _build(
    folder: Path,
    sources: Mapping[str, str],
    headers: Mapping[str, str],
    compiler: list[str],
    paths: tuple[str, ...],
) -> None:
    for name, text in {**sources, **headers}.items():
        (folder / name).write_text(text, encoding="utf-8")
    if len(sources) == 1:
        _run(folder, [*compiler, *sources, "-o", LIBRARY, *paths])
        return
    objects = [f"{Path(name).stem}.o" for name in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [
            pool.submit(_run, folder, [*compiler, "-c", name, "-o", place, *paths])
            for name, place in zip(sources, objects, strict=True)
        ]
        for future in made:
            future.result()
    _run(folder, [*compiler, *objects, "-o", LIBRARY, *paths])
    for name in objects:
        (folder / name).unlink()


def _run(folder: Path, command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CompileFailed(f"{command[0]} ran longer than {TIMEOUT_SECONDS} s") from error
    if done.returncode != 0:
        raise CompileFailed(f"{Path(command[0]).name}: {first_complaint(done.stderr)}")


def first_complaint(text: str) -> str:
    """The first line of compiler output that reports an error, else the first line at all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no output")
