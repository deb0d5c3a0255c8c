"""How a norm gets into a framework: one file a framework, timm with another for the papers' networks, each with
``register()`` and ``unregister()``. PyTorch, which all are built on, has one too."""

import functools
import importlib
import importlib.util
import itertools
import sys
import warnings
from types import ModuleType

from fbn_plugin.adapters import register_loader
from fbn_plugin.frameworks import pytorch

# The files that plug into each.
FRAMEWORKS = {"detectron2": ["detectron2"], "timm": ["timm", "timm_models"], "torchvision": ["torchvision"]}


def _adapters(names) -> dict[str, list[ModuleType]]:
    adapters = {}
    for name in names:
        try:
            adapters[name] = [importlib.import_module(f"fbn_plugin.frameworks.{file}") for file in FRAMEWORKS[name]]
        except Exception as error:  # a package that was built against another torch fails in many ways
            warnings.warn(f"{name} is installed but cannot be imported, so it gets no norms: {error}", stacklevel=3)
    return adapters


def register() -> list[str]:
    """Plug the registered norms into every installed framework, however often and in whatever import order.

    With or without a framework, ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` warns from now on if it is given
    filtered norms, whose filter it drops.

    Returns:
        The names of the frameworks, out of ``detectron2``, ``timm`` and ``torchvision``.

    Examples::

        >>> import timm
        >>> "timm" in fbn_plugin.register()
        True
        >>> type(timm.create_model("resnet18", norm_layer="fbn").bn1).__name__
        'FilteredBatchNorm2d'
        >>> fbn_plugin.unregister()
    """
    pytorch.register()
    adapters = _adapters(name for name in FRAMEWORKS if importlib.util.find_spec(name) is not None)
    for adapter in itertools.chain(*adapters.values()):
        adapter.register()
    return list(adapters)


def unregister() -> None:
    """Take out of the frameworks what :func:`register` put in.

    Examples::

        >>> _ = fbn_plugin.register()
        >>> fbn_plugin.unregister()
    """
    pytorch.unregister()
    for name in itertools.chain(*FRAMEWORKS.values()):
        adapter = sys.modules.get(f"fbn_plugin.frameworks.{name}")
        if adapter is not None:
            adapter.unregister()


for _name in FRAMEWORKS:
    register_loader(_name, functools.partial(_adapters, [_name]))
