"""What the values of a config must be, as tables of ``key: rule`` that the engines share and add to, and the sentence
that refuses a value: "KEY must be ..., got ...".
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fbn_plugin.engine.files.words import hint, shown
from fbn_plugin.registry import matching_names, parse_spec

__all__ = [
    "COMMON_RULES",
    "MOST_CHANNELS",
    "MOST_ITERATIONS",
    "Rule",
    "above",
    "at_least",
    "between",
    "check_norms",
    "check_values",
    "each",
    "each_of",
    "exactly",
    "from_to_below",
    "get_value",
    "increasing",
    "multiple_of",
    "named",
    "of_length",
    "one_of",
    "or_zero",
    "refusal",
]

# Beyond these nobody means what he writes: it would take a lifetime, or more memory than there is.
MOST_ITERATIONS = 2**31 - 1
MOST_CHANNELS = 2**14


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        what: in words, behind "must be".
        accepts: whether a value is that.
        names: that are accepted, of which the one that is near to a wrong name is told.
    """

    what: str
    accepts: Callable[[Any], bool]
    names: Sequence[str] = ()


def refusal(key: str, what: str, value: Any) -> ValueError:
    """The error that refuses a value."""
    return ValueError(f"{key} must be {what}, got {shown(value)}")


@contextlib.contextmanager
def named(key: str) -> Iterator[None]:
    """Put a key in front of the sentence of what a block refuses."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{key}: {error}") from None


def get_value(cfg: Mapping[str, Any], key: str) -> Any:
    """The value of ``"A.B.C"``."""
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def check_values(cfg: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Hold a config against a table of rules.

    Raises:
        ValueError: the first value that breaks its rule, one of a wrong type included.
    """
    for key, rule in rules.items():
        value = get_value(cfg, key)
        try:
            accepted = rule.accepts(value)
        except TypeError:
            accepted = False
        if not accepted:
            raise ValueError(f"{refusal(key, rule.what, value)}{hint(value, rule.names)}")


def check_norms(norms: Mapping[str, str], parse: Callable[[str], Any] = parse_spec) -> None:
    """Refuse what names no norm.

    Args:
        norms: key -> spec; an empty one is no norm.
        parse: raises ValueError for a spec that is none.

    Raises:
        ValueError: with what ``parse`` says.
    """
    for key, spec in norms.items():
        if spec:
            try:
                parse(spec)
            except ValueError as error:
                known = isinstance(spec, str) and matching_names(spec.partition("(")[0].strip())
                hint = "" if known else "; --import names the file or module that registers a norm of yours"
                raise ValueError(f"{key} must be the spec of a norm, got {spec!r}: {error}{hint}") from None


def exactly(value: Any, reason: str = "") -> Rule:
    """That one value; ``reason`` follows it in the sentence."""
    return Rule(f"{value!r} {reason}".rstrip(), lambda given: given == value)


def one_of(*values: Any) -> Rule:
    """One of a few values."""
    names = [each for each in values if isinstance(each, str) and each]
    return Rule(f"one of {', '.join(map(repr, values))}", lambda given: given in values, names)


def at_least(least: float, most: float = math.inf) -> Rule:
    """A finite number, from ``least`` on, up to ``most``."""
    return Rule(f"{least} or more{_and_at_most(most)}", lambda given: least <= given <= most and given < math.inf)


def above(bound: float, most: float = math.inf) -> Rule:
    """A finite number greater than ``bound``, up to ``most``."""
    return Rule(f"above {bound}{_and_at_most(most)}", lambda given: bound < given <= most and given < math.inf)


def _and_at_most(most: float) -> str:
    return "" if most == math.inf else f", and {most} or less"


def from_to_below(low: float, high: float) -> Rule:
    """A number from ``low`` on that is smaller than ``high``."""
    return Rule(f"from {low} to less than {high}", lambda given: low <= given < high)


def or_zero(rule: Rule) -> Rule:
    """What a rule accepts, or 0."""
    return Rule(f"0, or {rule.what}", lambda given: given == 0 or rule.accepts(given))


def between(low: float, high: float) -> Rule:
    """A number from ``low`` to ``high``, both included."""
    return Rule(f"from {low} to {high}", lambda given: low <= given <= high)


def each(rule: Rule) -> Rule:
    """A list, not an empty one, whose elements all keep to a rule; or a single value that does."""

    def accepts(given: Any) -> bool:
        values = given if isinstance(given, list | tuple) else (given,)
        return len(values) > 0 and all(rule.accepts(value) for value in values)

    return Rule(f"one value or more, each {rule.what}", accepts)


def each_of(most: int, rule: Rule) -> Rule:
    """A list of up to so many values, not an empty one, which all keep to a rule."""
    return Rule(f"1 to {most} values, each {rule.what}", lambda given: len(given) <= most and each(rule).accepts(given))


def of_length(length: int, rule: Rule | None = None, reason: str = "") -> Rule:
    """A list of so many values, all of which keep to ``rule``; ``reason`` follows their number in the sentence."""
    what = f"a list of {length} {reason}".rstrip() + (f", each {rule.what}" if rule else "")
    return Rule(what, lambda given: len(given) == length and (rule is None or each(rule).accepts(given)))


def multiple_of(factor: int, of: str = "") -> Rule:
    """A multiple of a number; ``of`` says what that is."""
    return Rule(f"a multiple of {of or factor}", lambda given: given % factor == 0)


def increasing(what: str) -> Rule:
    """A list of values from 1 on that grow from each to the next; ``what`` names them."""

    def accepts(given: Any) -> bool:
        return list(given) == sorted(set(given)) and all(1 <= value <= MOST_ITERATIONS for value in given)

    return Rule(f"increasing {what}, from 1 on", accepts)


# Keys that mean the same in every engine.
COMMON_RULES = {
    "DATALOADER.NUM_WORKERS": at_least(0, 1024),
    "INPUT.NORM_GAMMA_INIT": between(0, 1),
    "SOLVER.BASE_LR": above(0, 1e30),
    "SOLVER.IMS_PER_BATCH": at_least(1, 2**20),
    "SOLVER.MOMENTUM": from_to_below(0, 1),
    "SOLVER.SCALE_LR_DIVISOR": or_zero(between(0.001, 10**6)),
    "SOLVER.WARMUP_FACTOR": between(0, 1),
    "SOLVER.WEIGHT_DECAY": at_least(0, 100),
    "TEST.EVAL_PERIOD": at_least(0, MOST_ITERATIONS),
}
