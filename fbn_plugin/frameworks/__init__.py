"""How a norm gets into a framework: one file a framework, timm with another for the papers' networks, each with
``register()`` and ``unregister()``. PyTorch, which all are built on, has one too."""

import functools
import importlib
import itertools
import sys
import warnings
from types import ModuleType

from fbn_plugin import internals
from fbn_plugin.adapters import register_loader
from fbn_plugin.frameworks import imports, pytorch

# The files that plug into each.
FRAMEWORKS = {
    "detectron2": ["detectron2"],
    "timm": ["timm", "timm_models"],
    "torchvision": ["torchvision"],
    "mmengine": ["mmengine"],
    "transformers": ["huggingface"],
    "ultralytics": ["ultralytics"],
}

# These are entered when the program imports the module that holds what is entered, and not before: importing all three
# takes register() from 1.5 to 3 seconds, or to 7 where their files are not in memory, and Ultralytics writes a settings
# file when it is imported. What is entered in them is read when a model is built, so nothing comes too late.
LATE = {
    "mmengine": "mmengine.registry",
    "transformers": "transformers.modeling_utils",
    "ultralytics": "ultralytics.engine.model",
}


def _adapters(names) -> dict[str, list[ModuleType]]:
    adapters = {}
    for name in names:
        try:
            internals.require(name)
            adapters[name] = [importlib.import_module(f"fbn_plugin.frameworks.{file}") for file in FRAMEWORKS[name]]
        except Exception as error:  # a package that was built against another torch fails in many ways
            warnings.warn(f"{name} is installed but cannot be imported, so it gets no norms: {error}", stacklevel=3)
    return adapters


def register() -> list[str]:
    """Plug the registered norms into every installed framework, however often and in whatever import order.

    mmengine, Transformers and Ultralytics are not imported for it: they get theirs when the program imports them.

    With or without a framework, ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` warns from now on if it is given
    filtered norms, whose filter it drops, and ``torch.ao.quantization.fuse_modules`` takes the norms of this package.

    Returns:
        The names of the frameworks, out of ``detectron2``, ``timm``, ``torchvision``, ``mmengine``, ``transformers``
        and ``ultralytics``.

    Examples::

        >>> import timm
        >>> "timm" in fbn_plugin.register()
        True
        >>> type(timm.create_model("resnet18", norm_layer="fbn").bn1).__name__
        'FilteredBatchNorm2d'
        >>> fbn_plugin.unregister()
    """
    pytorch.register()
    installed = [name for name in FRAMEWORKS if internals.is_installed(name)]
    adapters = _adapters(name for name in installed if name not in LATE)
    for adapter in itertools.chain(*adapters.values()):
        adapter.register()
    for name in (later := [name for name in installed if name in LATE]):
        imports.after_import(LATE[name], _ENTER[name])
    return [*adapters, *later]


def _enter(name: str) -> None:
    for adapter in itertools.chain(*_adapters([name]).values()):
        adapter.register()


_ENTER = {name: functools.partial(_enter, name) for name in LATE}


def unregister() -> None:
    """Take out of the frameworks what :func:`register` put in.

    Examples::

        >>> _ = fbn_plugin.register()
        >>> fbn_plugin.unregister()
    """
    pytorch.unregister()
    for name, module in LATE.items():
        imports.forget(module, _ENTER[name])
    for name in itertools.chain(*FRAMEWORKS.values()):
        adapter = sys.modules.get(f"fbn_plugin.frameworks.{name}")
        if adapter is not None:
            adapter.unregister()


for _name in FRAMEWORKS:
    register_loader(LATE.get(_name, _name), functools.partial(_adapters, [_name]))
