"""The public face of the package."""

import subprocess
import sys

import fbn_plugin


def test_importing_brings_in_torch_and_nothing_heavier():
    code = "import fbn_plugin, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"timm", "torchvision", "detectron2", "pycocotools", "matplotlib", "sklearn"} & set(modules)


def test_every_public_name_exists_and_has_a_docstring():
    for name in fbn_plugin.__all__:
        assert getattr(fbn_plugin, name).__doc__, name


def test_register_names_the_frameworks_any_number_of_times():
    try:
        first = fbn_plugin.register()
        assert first == fbn_plugin.register() and {"timm", "torchvision"} <= set(first)
    finally:
        fbn_plugin.unregister()
        fbn_plugin.unregister()
