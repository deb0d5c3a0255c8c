"""Values as a command line writes them: Python literals or plain text, as yacs reads them, but in bounded time and
memory."""

import ast
import re
import warnings
from typing import Any

__all__ = ["literal"]

_LONGEST = 2**15
_LONGEST_INTEGER = 2**64
_LITERAL = re.compile(r"""[\s+]*(?:[-(\[{'"\d.]|[rRbBuU]{1,2}['"]|(?:True|False|None)\b)""")


def literal(text: str) -> Any:
    """What a text is as a Python literal: a number, text in quotes, a list, a tuple, a mapping, True, False, None.

    Anything else is the text itself: a path, a norm, what Python cannot parse, a whole number of more than 64 bits, and
    what is longer than 32,768 characters.

    Examples::

        >>> literal("(3, 4)"), literal("'3'"), literal("FBN(t_sigma=4)")
        ((3, 4), '3', 'FBN(t_sigma=4)')
    """
    if len(text) > _LONGEST or not _LITERAL.match(text):
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a path that begins like a number, and others that are none
            value = ast.literal_eval(text)
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        return text
    return value if _is_plain(value) else text


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(each) for pair in value.items() for each in pair)
    if isinstance(value, int):
        return -_LONGEST_INTEGER < value < _LONGEST_INTEGER
    return value is None or isinstance(value, float | str)
