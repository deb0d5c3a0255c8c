"""Modules that a model keeps outside of its tree of submodules, where ``named_modules()`` does not see them: in a plain
list, dict or tuple, a ``functools.partial``, a bound method, a closure. What takes the place of a module in the tree
has to take it there too, or the model goes on with the old one."""

import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

_TREE = ("_modules", "_parameters", "_buffers")


def replace_references(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> list[str]:
    """Put new modules in the place of old ones in the attributes of all modules of ``model``: in lists and dicts, in
    place, and in tuples, partials and bound methods.

    Returns:
        the names of the attributes that still hold an old one: closures, sets and keys of dicts are not changed.
    """
    for module in model.modules():
        for name, value in _attributes(module):
            new = _renewed(value, replaced, set())
            if new is not value:
                vars(module)[name] = new  # not by setattr, which would enter a module in the tree
    return holders(model, replaced)


def holders(model: nn.Module, sought: Iterable[nn.Module]) -> list[str]:
    """The names of the attributes that hold one of these modules outside of the tree, but for what holds itself."""
    sought = set(sought)
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, value in _attributes(module)
        if any(each in sought and each is not module for each in _held(value, set()))
    ]


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(module).items() if name not in _TREE]


def _renewed(value: Any, replaced: dict[nn.Module, nn.Module], seen: set[int]) -> Any:
    """``value`` with the new modules in the place of the old ones; itself, if there are none or it can be changed."""
    if isinstance(value, nn.Module):
        return replaced.get(value, value)
    if id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, list | dict):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            new = _renewed(item, replaced, seen)
            if new is not item:
                value[key] = new
    elif type(value) is tuple:
        items = tuple(_renewed(item, replaced, seen) for item in value)
        return items if any(new is not old for new, old in zip(items, value)) else value
    elif type(value) is functools.partial:
        old = (value.func, value.args, *value.keywords.values())
        function, args, *values = new = [_renewed(part, replaced, seen) for part in old]
        if any(one is not other for one, other in zip(new, old)):
            return functools.partial(function, *args, **dict(zip(value.keywords, values)))
    elif isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module) and value.__self__ in replaced:
        return getattr(replaced[value.__self__], value.__name__, value)
    return value


def _held(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """The modules in a value, and in what containers, partials, methods and functions hold."""
    if isinstance(value, nn.Module):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        inner = list(value)
    elif isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        inner = [value.__self__, value.__func__]
    elif isinstance(value, types.FunctionType):
        cells = [cell for cell in value.__closure__ or () if _is_set(cell)]
        inner = [
            *(cell.cell_contents for cell in cells),
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
        ]
    for item in inner:
        yield from _held(item, seen)


def _is_set(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that has no value yet
        return False
