"""Frameworks that are entered when a program imports them: before or after register(), and not at all."""

import importlib
import subprocess
import sys

import pytest

from fbn_plugin import frameworks
from fbn_plugin.frameworks import imports


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package ``latecomer`` with a module ``inner`` that is not imported with it."""
    (tmp_path / "latecomer").mkdir()
    (tmp_path / "latecomer" / "__init__.py").write_text("")
    (tmp_path / "latecomer" / "inner.py").write_text("def theirs():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "latecomer"
    for name in [name for name in sys.modules if name.partition(".")[0] == "latecomer"]:
        del sys.modules[name]


def test_calls_once_after_the_module_has_run(package):
    calls = []

    def note():
        calls.append(hasattr(sys.modules["latecomer.inner"], "theirs"))

    imports.after_import("latecomer.inner", note)
    imports.after_import("latecomer.inner", note)
    importlib.import_module("latecomer")
    assert calls == []
    importlib.import_module("latecomer.inner")
    assert calls == [True]
    assert imports._watcher not in sys.meta_path
    imports.after_import("latecomer.inner", note)  # it is there
    assert calls == [True, True]


def test_forgets(package):
    calls = []
    imports.after_import("latecomer.inner", calls.clear)
    imports.forget("latecomer.inner", calls.clear)
    imports.forget("latecomer.inner", calls.clear)
    assert imports._watcher not in sys.meta_path
    importlib.import_module("latecomer.inner")


def test_a_module_that_fails_is_waited_for_again(package):
    calls = []
    code = (package / "inner.py").read_text()
    (package / "inner.py").write_text("raise ImportError('broken')\n")
    imports.after_import("latecomer.inner", lambda: calls.append(1))
    with pytest.raises(ImportError, match="broken"):
        importlib.import_module("latecomer.inner")
    assert calls == []
    (package / "inner.py").write_text(code)
    importlib.invalidate_caches()
    importlib.import_module("latecomer.inner")
    assert calls == [1]


def test_register_imports_none_of_them_and_each_is_entered_when_it_is_imported():
    """In a process of its own, which has imported nothing."""
    code = """
import importlib.util, sys, fbn_plugin
from fbn_plugin.frameworks import FRAMEWORKS, LATE, imports
before = set(sys.modules)
names = fbn_plugin.register()
assert names == fbn_plugin.register()
assert [name for name in FRAMEWORKS if importlib.util.find_spec(name)] == names
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not new & {*LATE, "mmcv", "cv2"}, new
if "mmengine" in names:
    import mmengine.registry
    fbn_plugin.unregister()
    assert imports._watcher not in sys.meta_path, imports._waiting
    fbn_plugin.register()
if "mmengine" in names and importlib.util.find_spec("mmcv"):
    from mmcv.cnn import build_norm_layer, fuse_conv_bn
    assert type(build_norm_layer({"type": "FBN"}, 8)[1]) is fbn_plugin.FilteredBatchNorm2d
    assert hasattr(fuse_conv_bn, "__wrapped__")
if "ultralytics" in names:
    from ultralytics import YOLO
    assert YOLO.train.__globals__["__name__"] == "fbn_plugin.frameworks.ultralytics"
if "transformers" in names:
    from transformers import PreTrainedModel
    assert PreTrainedModel.post_init.__globals__["__name__"] == "fbn_plugin.frameworks.huggingface"
fbn_plugin.unregister()
fbn_plugin.unregister()
assert imports._watcher not in sys.meta_path, imports._waiting
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_adapter_that_fails_warns_and_the_program_goes_on(package, monkeypatch):
    monkeypatch.setitem(frameworks.FRAMEWORKS, "latecomer", ["gone"])
    imports.after_import("latecomer.inner", lambda: frameworks._enter("latecomer"))
    with pytest.warns(UserWarning, match="latecomer is installed but cannot be imported"):
        assert importlib.import_module("latecomer.inner").theirs() == 1
