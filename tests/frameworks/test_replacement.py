"""A function gives its place to another for everyone who holds it, and gets it back."""

import copy
import functools
import importlib
import inspect
import pickle
import sys

import pytest

from fbn_plugin.frameworks import replacement

SOURCE = '''
def scale(x, factor=2, *, shift=0):
    """Doubles."""
    return factor * x + shift

def count(tree):
    return 1 + sum(count(child) for child in tree)

class Tree:
    @classmethod
    def size(cls, tree):
        return [cls.__name__, *(cls.size(child) for child in tree)]

def make(offset):
    def shifted(x):
        return x + offset
    return shifted

shifted = make(1)
number = 3
'''
NAMES = ("scale", "count", "Tree.size.__func__")


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    (tmp_path / "someones_functions.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(replacement, "_REPLACED", {})
    yield importlib.import_module("someones_functions")
    for name in NAMES:
        replacement.restore(f"someones_functions.{name}")
    del sys.modules["someones_functions"]


def test_everyone_who_holds_it_gets_ours_and_then_theirs_back(theirs):
    def closure(x):
        return held(x)

    held = theirs.scale
    holder = type("Holder", (), {"own": staticmethod(theirs.scale), "default": theirs.scale})
    bound = functools.partial(theirs.scale, factor=3)
    calls = {
        "closure": closure,
        "dict": {"f": theirs.scale}["f"],
        "partial": bound,
        "copied": copy.deepcopy(bound),
        "static": holder.own,
        "module": lambda x: theirs.scale(x),
    }
    before = {name: call(5) for name, call in calls.items()}
    doc, signature = theirs.scale.__doc__, inspect.signature(theirs.scale)

    replacement.replace("someones_functions.scale", lambda x, factor=2, *, shift=0: ("ours", x, factor, shift))
    replacement.replace("someones_functions.scale", lambda x, factor=2, *, shift=0: ("ours", x, factor, shift))
    for name, call in calls.items():
        assert call(5) == ("ours", 5, 3 if name[0] == "p" or name == "copied" else 2, 0), name
    assert held(1, 4, shift=6) == ("ours", 1, 4, 6)
    assert replacement.original("someones_functions.scale")(1, 4, shift=6) == 10
    assert (held.__doc__, held.__module__, held.__name__) == (doc, "someones_functions", "scale")
    assert inspect.signature(held) == signature
    assert pickle.loads(pickle.dumps(held)) is held

    replacement.restore("someones_functions.scale")
    replacement.restore("someones_functions.scale")
    assert {name: call(5) for name, call in calls.items()} == before
    assert inspect.signature(held) == signature and not hasattr(held, "__wrapped__")


def test_a_function_that_calls_itself_gives_the_outermost_call_alone(theirs):
    seen = []

    def ours(tree):
        seen.append(tree)
        return -replacement.original("someones_functions.count")(tree)

    replacement.replace("someones_functions.count", ours, calls_itself=True)
    tree = [[], [[]]]
    assert theirs.count(tree) == -4 and seen == [tree]
    with pytest.raises(TypeError):
        theirs.count(3)
    assert theirs.count(tree) == -4 and len(seen) == 3


def test_a_class_method_that_was_bound_before(theirs):
    bound, name = theirs.Tree.size, "someones_functions.Tree.size.__func__"
    child = type("Child", (theirs.Tree,), {})
    replacement.replace(name, lambda cls, tree: ("ours", replacement.original(name)(cls, tree)), calls_itself=True)
    assert bound([[]]) == ("ours", ["Tree", ["Tree"]]) and child.size([]) == ("ours", ["Child"])
    replacement.restore(name)
    assert bound([]) == ["Tree"]


def test_a_module_that_is_loaded_anew(theirs):
    replacement.replace("someones_functions.scale", lambda x: "ours")
    old = theirs.scale
    importlib.reload(theirs)
    assert theirs.scale is not old and theirs.scale(1) == 2
    replacement.replace("someones_functions.scale", lambda x: "ours again")
    assert (theirs.scale(1), old(1)) == ("ours again", "ours again")
    replacement.restore("someones_functions.scale")
    assert (theirs.scale(1), old(1)) == (2, 2)


@pytest.mark.parametrize("name", ["shifted", "number", "gone"])
def test_what_cannot_get_another_code_is_refused(theirs, name):
    with pytest.raises(ValueError, match=f"someones_functions.{name} is not a plain function"):
        replacement.original(f"someones_functions.{name}")
