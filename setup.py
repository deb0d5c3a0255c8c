"""Packaging of fbn_plugin; needs no torch at build time."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "fbn_plugin" / "__init__.py").read_text(), re.MULTILINE)[1]

CLASSIFICATION = ["timm>=1.0.21", "torchvision>=0.21", "scikit-learn", "tensorboard", "tqdm", "matplotlib"]
DETECTION = ["torchvision>=0.21", "pycocotools", "iopath", "tensorboard", "tqdm", "matplotlib"]
DEMO = [*DETECTION, "scikit-learn"]
STUDIES = ["scipy>=1.15", "matplotlib"]
CLUSTER = ["submitit>=1.5"]
TEST = ["pytest", "pytest-xdist", "hypothesis", "ruff", "onnx", "onnxscript", "onnxruntime"]
# Other frameworks that norms get into. mmengine asks for a function that Python 3.14 dropped.
PEERS = ['mmengine; python_version < "3.14"', "mmcv-lite", "transformers", "ultralytics"]
DOCS = ["sphinx", "myst-parser", "furo", "sphinx-copybutton"]

# Not a Python module: a library that fbn_plugin/ops/cpu/ loads. Without a compiler the package installs all the same.
# It is not linked to an OpenMP runtime, so that it uses the one that PyTorch brings.
KERNELS = Extension(
    "fbn_plugin.ops.cpu._kernels",
    sources=["fbn_plugin/ops/cpu/kernels.cpp"],
    depends=sorted(str(each.relative_to(HERE)) for each in (HERE / "fbn_plugin/ops/cpu").glob("*.h")),
    language="c++",
    extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi"],
    optional=True,
)

setup(
    name="fbn_plugin",
    version=VERSION,
    description="Filtered batch normalization and its relatives for detectron2, timm, torchvision and PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    ext_modules=[KERNELS],
    packages=find_packages(include=["fbn_plugin", "fbn_plugin.*"]),
    package_data={
        "fbn_plugin": ["py.typed"],
        "fbn_plugin.ops.cuda": ["*.cu", "*.cpp"],
    },  # the kernels are compiled at run time
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "numpy", "fvcore", "yacs", "pyyaml"],
    extras_require={
        "classification": CLASSIFICATION,
        "detection": DETECTION,
        "demo": DEMO,
        "studies": STUDIES,
        "cluster": CLUSTER,
        "docs": DOCS,
        "test": [*TEST, *CLASSIFICATION, *DEMO, *STUDIES, *CLUSTER, *PEERS],
    },
)
