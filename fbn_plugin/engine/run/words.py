"""Numbers of things in the sentences that tools print."""

__all__ = ["counted"]

_PLURALS = {
    "batch": "batches",
    "category": "categories",
    "class": "classes",
    "entry": "entries",
    "process": "processes",
}


def counted(number: int, what: str) -> str:
    """A number with its noun: ``1 process``, ``2 processes``.

    Args:
        number: how many.
        what: one of them; more words than one end in the noun.
    """
    if number == 1:
        return f"{number:,} {what}"
    before, space, noun = what.rpartition(" ")
    return f"{number:,} {before}{space}{_PLURALS.get(noun, noun + 's')}"
