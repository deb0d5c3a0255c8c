"""A function whose code is exchanged: whoever holds it gets the other one, and it comes back as it was."""

import functools
import inspect
import pickle

from fbn_plugin.frameworks.redirect import Redirection


def scaled(x, *, factor=2, offset=0):
    """The documentation."""
    return factor * x + offset


HOLDERS = [functools.partial(scaled, 1, offset=1), {"key": scaled}["key"], pickle.loads(pickle.dumps(scaled))]


def test_all_holders_are_reached_and_given_back():
    before = inspect.signature(scaled)
    redirection = Redirection(scaled)
    for _ in range(2):  # twice is as once
        redirection.start(lambda *args, **kwargs: ("ours", redirection.original(*args, **kwargs)))
    try:
        assert [HOLDERS[0](), HOLDERS[1](3), HOLDERS[2](3, factor=5)] == [("ours", 3), ("ours", 6), ("ours", 15)]
        assert inspect.signature(scaled) == before and scaled.__doc__ == "The documentation."
    finally:
        redirection.stop()
    redirection.stop()
    assert [HOLDERS[0](), HOLDERS[1](3), HOLDERS[2](3, factor=5)] == [3, 6, 15]
    assert inspect.signature(scaled) == before and not hasattr(scaled, "__signature__")
