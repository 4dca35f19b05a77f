"""Package metadata; `pyproject.toml` holds the settings of the tools only."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SHIPPED = ("patches", "launch", "configs")


class BuildWithShipped(build_py):
    """Also copy the top-level folders that the commands read into the wheel, as `es_megatron/_shipped/NAME`.

    An editable install leaves them out: there `es_megatron.resources` finds the folders of the checkout.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in SHIPPED:
            source = HERE / name
            if not source.is_dir():
                raise FileNotFoundError(f"`{name}/` must stand beside setup.py to be shipped, but does not: {source}")
            target = Path(self.build_lib) / "es_megatron" / "_shipped" / name
            shutil.rmtree(target, ignore_errors=True)  # an earlier build may have left what is no longer there
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))


def read_readme() -> str:
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


FORMATS = ["pyarrow"]  # text that is Parquet or zstd
REPORT = ["tensorboard", "matplotlib", "jinja2", "pyarrow"]
DEEPSPEED = ["deepspeed>=0.16"]  # tested: 0.19.8
HUGGINGFACE = ["accelerate>=1.0", "transformers>=5.0"]  # tested: 1.15.0, 5.24.0
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"]  # tested: 1.6.1, 9.8.2, 1.0.8
DEV = [
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "ruff>=0.11",
    "pyright[nodejs]",  # nodejs: so that a machine without node need not download one
    "import-linter>=2.1",
    "tensorboard",
    "tree-sitter>=0.23",  # a grammar of bash, against which the reader of scripts is tested
    "tree-sitter-bash>=0.23",
]

setup(
    name="es_megatron",
    version="0.1.0",
    description="Evolved Sampling for pretraining with Megatron and DeepSpeed: spend the backward pass where it pays",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["es_megatron", "es_megatron.*"]),
    package_data={
        "es_megatron": ["py.typed"],
        "es_megatron.bench": ["page.html.j2"],
        "es_megatron.report": ["page.html.j2"],
        "es_megatron.forecast": ["expected.json"],
    },
    cmdclass={"build_py": BuildWithShipped},
    install_requires=[
        "torch>=2.6",  # tested: 2.13.0
        "numpy>=1.26",
        # Tested: 0.16.1 on Python 3.11, 0.19.2 on 3.12 (es_megatron/checks/versions.py). 0.17 and later do not install
        # on 3.11; no version from 0.16 on is known not to work. A checkout of Megatron-LM brings its own megatron.core.
        'megatron-core>=0.16,<0.17; python_version < "3.12"',
        'megatron-core>=0.16; python_version >= "3.12"',
        "sentencepiece>=0.2",
        "safetensors>=0.4",
        "pyyaml>=6",
        "tqdm>=4.60",
        "packaging",
        "typing_extensions>=4.4",
        "psutil>=5.9",  # megatron-core needs it to save, and does not declare it
    ],
    extras_require={
        "deepspeed": DEEPSPEED,
        "huggingface": HUGGINGFACE,
        "formats": FORMATS,
        "report": REPORT,
        "docs": DOCS,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["es-megatron = es_megatron.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
