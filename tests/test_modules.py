"""Names of modules: ``package.name`` must mean one thing, a module or a function, in whatever order things are
imported."""

import ast
from pathlib import Path

import fbn_plugin

PACKAGE = Path(fbn_plugin.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def defined(file: Path) -> set[str]:
    """Functions and classes of a file."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def handed_on(init: Path) -> set[str]:
    """What a package's ``__init__`` imports from other modules, by the names that it gives it."""
    body = ast.parse(init.read_text(encoding="utf-8")).body
    package = ".".join(init.parent.relative_to(PACKAGE.parent).parts)
    imports = [node for node in body if isinstance(node, ast.ImportFrom) and node.module != package]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def test_no_package_has_a_function_and_a_module_of_one_name():
    shared = []
    for init in (file for file in FILES if file.name == "__init__.py"):
        modules = {file.stem for file in init.parent.glob("*.py")}
        modules |= {file.parent.name for file in init.parent.glob("*/__init__.py")}
        shared += [f"{init.parent.name}.{name}" for name in sorted(modules & (defined(init) | handed_on(init)))]
    assert not shared


def test_no_module_has_the_name_of_its_own_function():
    assert not [str(file) for file in FILES if file.stem in defined(file)]


def test_no_public_name_is_a_modules():
    modules = {file.stem for file in FILES} | {file.parent.name for file in FILES}
    assert modules & set(fbn_plugin.__all__) == {"ops"}  # which is one
