"""What the package uses of other packages' insides: it is there, one file lists it, and what happens without it."""

import ast
import importlib
import importlib.metadata
import inspect
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import fbn_plugin
from fbn_plugin import internals

PACKAGE = Path(fbn_plugin.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [*(name for names in internals.NEEDED.values() for name in names), *internals.OPTIONAL]


def skip_without_package(name: str) -> None:
    package = name.partition(".")[0]
    if not internals.is_installed(package):
        pytest.skip(f"{package} is not installed")


def test_a_folder_of_a_packages_name_is_no_package(tmp_path, monkeypatch):
    """Python imports it as one, without content."""
    (tmp_path / "nothing_but_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "stands_in", types.ModuleType("stands_in"))
    assert all(map(internals.is_installed, ("torch", "fvcore", "wave", "stands_in")))
    assert not internals.is_installed("nothing_at_all")
    assert not internals.is_installed("nothing_but_a_folder")
    importlib.import_module("nothing_but_a_folder")
    try:
        assert not internals.is_installed("nothing_but_a_folder")
    finally:
        del sys.modules["nothing_but_a_folder"]


@pytest.mark.parametrize("name", NAMES)
def test_name_is_there(name):
    skip_without_package(name)
    assert internals.lookup(name) is not None


@pytest.mark.parametrize("name", [f"{owner} {name}" for owner, names in internals.ATTRIBUTES.items() for name in names])
def test_attribute_is_there(name):
    skip_without_package(name)
    owner, name = name.split()
    assert re.search(rf"\b{name}\b", inspect.getsource(internals.lookup(owner)))


# --- one file lists them all ---------------------------------------------------------------------------------------


def _imported(tree: ast.Module) -> dict[str, str]:
    """The names that a file binds by imports, with what they mean; relative imports there are none."""
    meanings = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            meanings |= {
                a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            meanings |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return meanings


def _dotted(node: ast.expr, meanings: dict[str, str]) -> str | None:
    """``create_norm._NORM_MAP`` as ``timm.layers.create_norm._NORM_MAP``; None if it does not begin with an import."""
    path = []
    while isinstance(node, ast.Attribute):
        path.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in meanings:
        return None
    return ".".join([meanings[node.id], *reversed(path)])


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def _foreign(name: str) -> bool:
    return name.partition(".")[0] not in {*sys.stdlib_module_names, "fbn_plugin"}


def uses(source: str) -> Iterator[str]:
    """What a file reads that is not public, or assigns to, outside of itself: dotted names of other packages, and
    ``.attribute`` for those of objects."""
    tree = ast.parse(source)
    meanings = _imported(tree)
    yield from (meaning for meaning in meanings.values() if _foreign(meaning) and _is_private(meaning))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        name = _dotted(node, meanings)
        if name is not None:
            if _foreign(name) and (isinstance(node.ctx, ast.Store) or _is_private(name.rpartition(".")[2])):
                yield name
        elif _is_private(node.attr) and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            yield f".{node.attr}"


def _own_names() -> set[str]:
    """What the package's files define or set on ``self``, and what a named tuple has."""
    own = {"_replace", "_fields", "_asdict"}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return own


# Switches that are there to be set.
SETTINGS = ("torch.backends.", "torch.set_")


def test_no_file_uses_what_is_not_listed():
    listed = {*NAMES, *(f".{name}" for names in internals.ATTRIBUTES.values() for name in names)}
    listed |= {name.removesuffix(end) for name in NAMES for end in (".__func__", ".__wrapped__")}
    own = {f".{name}" for name in _own_names()}
    found = {
        f"{file.relative_to(PACKAGE)}: {name}"
        for file in FILES
        if file.name not in ("eager.py", "internals.py")
        for name in uses(file.read_text(encoding="utf-8"))
        if name not in listed | own and not name.startswith(SETTINGS)
    }
    assert not found


def test_the_search_finds_what_it_is_for():
    assert set(
        uses(
            "import torch\nfrom torch.nn.modules.conv import _ConvNd\nfrom timm.models import _registry as r, resnet\n"
            "torch._C._len()\nr._entries.pop(1)\nresnet.ResNet.forward = None\nmodel._modules\nself._mine\n"
        )
    ) == {
        "torch.nn.modules.conv._ConvNd",
        "timm.models._registry",
        "torch._C",
        "torch._C._len",
        "timm.models._registry._entries",
        "timm.models.resnet.ResNet.forward",
        "._modules",
    }


def test_nothing_is_listed_that_no_file_uses():
    text = "".join(file.read_text(encoding="utf-8") for file in FILES if file.name != "internals.py")
    for name in (*NAMES, *(name for names in internals.ATTRIBUTES.values() for name in names)):
        last = re.sub(r"\.__\w+__", "", name).rpartition(".")[2]
        assert re.search(rf"\b{last}\b", text), name


def test_the_oldest_versions_are_those_of_setup_and_of_test_oldest():
    root = PACKAGE.parent
    constraints = dict(re.findall(r"^(\w+)==(\S+)", (root / "constraints-oldest.txt").read_text(), re.MULTILINE))
    for package, oldest in re.findall(r"\"(\w+)>=([\d.]+)\"", (root / "setup.py").read_text()):
        if package in internals.VERSIONS:
            assert constraints[package].removesuffix(".0") == oldest == internals.VERSIONS[package].split()[0]


# --- what happens without ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["torch", "torchvision", "timm"])
def test_a_needed_name_that_is_gone(package, monkeypatch):
    name = f"{package}.utils.model._gone"
    monkeypatch.setitem(internals.NEEDED, package, (*internals.NEEDED[package], name))
    with pytest.raises(ImportError) as error:
        internals.require(package)
    version = importlib.metadata.version(package)
    for part in (name, f"{package} {version}", internals.VERSIONS[package]):
        assert part in str(error.value)


def test_a_framework_without_a_needed_name_gets_no_norms_and_the_others_do(monkeypatch):
    monkeypatch.setitem(internals.NEEDED, "timm", ("timm.layers.gone.get_norm_layer",))
    try:
        with pytest.warns(UserWarning, match=r"timm .* has no timm\.layers\.gone\.get_norm_layer.* tested with timm"):
            assert "torchvision" in (registered := fbn_plugin.register()) and "timm" not in registered
    finally:
        fbn_plugin.unregister()


def test_timm_without_its_dictionaries_of_models(monkeypatch):
    import timm

    from fbn_plugin.frameworks import timm_models

    found = internals.lookup
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="timm.models._registry") as said:
        patch.setattr(internals, "lookup", lambda name: None if "._registry." in name else found(name))
        importlib.reload(timm_models)
    assert len(said) == 6 and all("fbn_plugin.unregister leaves traces" in str(each.message) for each in said)
    try:
        fbn_plugin.register()
        model = timm.create_model("all_cnn_c", norm_layer="FBN")
        assert any(isinstance(module, fbn_plugin.FilteredBatchNorm2d) for module in model.modules())
        fbn_plugin.unregister()
        assert timm.is_model("all_cnn_c")
    finally:
        importlib.reload(timm_models)
        fbn_plugin.unregister()
    assert not timm.is_model("all_cnn_c")


def test_torchvision_without_its_list_of_leaves(monkeypatch):
    from torchvision.models import feature_extraction

    monkeypatch.delattr(feature_extraction, "_get_leaf_modules_for_ops")
    try:
        with pytest.warns(UserWarning, match="_get_leaf_modules_for_ops: create_feature_extractor cannot trace"):
            assert "torchvision" in fbn_plugin.register()
    finally:
        fbn_plugin.unregister()
    assert not hasattr(feature_extraction, "_get_leaf_modules_for_ops")


@pytest.mark.parametrize("name", internals.OPTIONAL)
def test_the_warning_says_what_is_lost(name, monkeypatch):
    skip_without_package(name)
    package = name.partition(".")[0]
    importlib.import_module(package)
    monkeypatch.setattr(internals, "lookup", lambda _: None)
    with pytest.warns(UserWarning) as said:
        assert internals.optional(name, {}) == {}
    for part in (name, internals.OPTIONAL[name], internals.VERSIONS[package], internals._version(package)):
        assert part in str(said[0].message)


# --- warnings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_deprecations_in_our_own_code_are_errors_here(category):
    """So that the tests notice before a release of another package removes something."""
    with pytest.raises(category):
        warnings.warn_explicit("old", category, "file.py", 1, module="fbn_plugin.layers.some")
    warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module="torch.some")
