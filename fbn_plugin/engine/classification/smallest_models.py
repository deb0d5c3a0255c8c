"""The smallest model with batch normalization of each family of a model library: what is checked in place of all its
models. They are found without allocating a weight."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode


class _TooLarge(Exception):
    pass


class _SkipInit(TorchFunctionMode):
    """Leave out the initialization of meta tensors: they hold no values, and it takes most of the time."""

    _skipped = ("uniform_", "normal_", "trunc_normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self._skipped and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _at_most(limit: float) -> Iterator[None]:
    """Give up building a model, with _TooLarge, once it has far more parameters than ``limit``."""
    count = 0

    def add(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal count
        count += 0 if parameter is None else parameter.numel()
        if count > 2 * limit:  # a model may build layers that it does not keep
            raise _TooLarge

    handle = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        handle.remove()


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Names and modules of all batch normalizations, filtered or not."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def _without_values(build: Callable[[str], nn.Module], name: str, limit: float) -> nn.Module:
    """A model to count the parameters of; _TooLarge if there are far more than ``limit``."""
    try:
        with torch.device("meta"), _SkipInit(), _at_most(limit):
            return build(name)
    except NotImplementedError:  # sizes are computed by an operator that PyTorch 2.6 has not for meta tensors
        with _at_most(limit):
            return build(name)


def smallest_model(
    build: Callable[[str], nn.Module], names: Iterable[str], at_most: float = float("inf")
) -> str | None:
    """The model that has the fewest parameters of those with batch normalization; None if no model has any.

    Args:
        build: of a name, the model, on the default device and with random weights.
        names: the models to choose from.
        at_most: parameters of the largest model that is of interest.
    """
    best, fewest = None, at_most
    # A small model first lets most others be given up early: names that begin with "test", then short ones.
    for name in sorted(names, key=lambda name: (not name.startswith("test"), len(name), name)):
        try:
            model = _without_values(build, name, fewest)
        except _TooLarge:
            continue
        count = sum(parameter.numel() for parameter in model.parameters())
        if batch_norms(model) and (count < fewest or (best is None and count == fewest)):
            best, fewest = name, count
    return best
