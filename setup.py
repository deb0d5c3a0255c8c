"""Packaging of fbn_plugin; needs no torch at build time."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "fbn_plugin" / "__init__.py").read_text(), re.MULTILINE)[1]

CLASSIFICATION = ["timm>=1.0.20", "torchvision>=0.21", "scikit-learn", "tensorboard", "tqdm"]
DETECTION = ["torchvision>=0.21", "pycocotools", "tensorboard", "tqdm", "matplotlib"]
DEMO = [*DETECTION, "scikit-learn"]
TEST = ["pytest", "hypothesis", "ruff"]

setup(
    name="fbn_plugin",
    version=VERSION,
    description="Filtered batch normalization and its relatives for detectron2, timm, torchvision and PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["fbn_plugin", "fbn_plugin.*"]),
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "numpy", "fvcore", "yacs", "pyyaml"],
    extras_require={
        "classification": CLASSIFICATION,
        "detection": DETECTION,
        "demo": DEMO,
        "test": [*TEST, *CLASSIFICATION, *DEMO],
    },
)
