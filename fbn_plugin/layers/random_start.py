"""Where the random numbers of a norm's own parameters come from: not from the stream that the layers around it draw
their weights from, so that with one seed a network's convolutions start alike whatever its norms are.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor


class _Local(threading.local):
    inside = False


_LOCAL = _Local()


def _current_seed() -> int | None:
    """A number that follows from where the CPU's stream is; None where that is not known, as under a mode that holds no
    values."""
    own = torch.Generator()
    own.set_state(torch.get_rng_state())
    number: Tensor = torch.randint(2**63 - 1, (), generator=own, device="cpu")
    return number.item() if type(number) is Tensor else None


@contextlib.contextmanager
def separate_stream() -> Iterator[None]:
    """Let what a block draws leave the global generators, of the CPU and of the current GPU, where they are.

    The block has a stream of its own that follows from the global one's state: other seeds give other numbers, the same
    seed the same. Within the block of another the stream goes on, so that norms which are built one after the other in
    one block differ.
    """
    if _LOCAL.inside:
        yield
        return
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    _LOCAL.inside = True
    try:
        with torch.random.fork_rng(devices):
            if (seed := _current_seed()) is not None:
                torch.default_generator.manual_seed(seed)
                for device in devices:
                    torch.cuda.default_generators[device].manual_seed(seed)
            yield
    finally:
        _LOCAL.inside = False
