"""Hugging Face Transformers: DETR, RT-DETR and their relatives, whose backbones have frozen batch norms of their own,
and what becomes of a converted model in ``save_pretrained`` and ``from_pretrained``.

A model is built from its config alone, so ``from_pretrained`` builds plain or frozen batch norms and puts the saved
weights into them. :func:`convert_pretrained` therefore notes in the config what it does, and after
``fbn_plugin.register()`` a model with such a note is converted as soon as it is built, before its weights are read. In
a program without this package the same folder loads too, as the plain model.

Each of Transformers' detectors has its own copy of one class, ``DetrFrozenBatchNorm2d``, ``RTDetrFrozenBatchNorm2d``
and so on (transformers/models/*/modeling_*.py, read in 5.24.0). They are found in the modules that are loaded: to
import all of them to name them would take seconds.
"""

import functools
import sys
import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from fbn_plugin.adapters import register_loader
from fbn_plugin.layers.description import FROZEN, describe_class, describe_type, families, family
from fbn_plugin.surgery.convert import convert_norm
from fbn_plugin.surgery.norm_report import NormReport

NOTE = "fbn_plugin"  # the entry of a config

_transformers_post_init = PreTrainedModel.post_init


def convert_pretrained(
    model: PreTrainedModel,
    spec: str,
    *,
    sources: str | Iterable[str] = ("BN", "FrozenBN"),
    report: NormReport | None = None,
    **options: Any,
) -> PreTrainedModel:
    """:func:`fbn_plugin.convert_norm`, noted in ``model.config``, so that ``save_pretrained`` saves it and
    ``from_pretrained`` repeats it in a program that has called ``fbn_plugin.register()``.

    What is noted is the spec and which modules became it, so that later it does not matter what is frozen.

    Args:
        model: changed in place.
        spec: such as ``"FBN(t_sigma=4)"``.
        sources: families to replace; here frozen batch norms are among them by default.
        report: is filled with what was changed and what was left; print it.
        **options: other arguments of :func:`fbn_plugin.convert_norm`.

    Returns:
        ``model``.

    Raises:
        ValueError: as :func:`fbn_plugin.convert_norm`.

    Examples::

        >>> from transformers import ResNetConfig, ResNetForImageClassification  # doctest: +SKIP
        >>> model = ResNetForImageClassification(ResNetConfig())  # doctest: +SKIP
        >>> model = convert_pretrained(model, "FBN(t_sigma=4)")  # doctest: +SKIP
        >>> model.save_pretrained("folder")  # doctest: +SKIP
    """
    done = NormReport()
    model = convert_norm(model, spec, sources=sources, report=done, **options)
    note = {"spec": str(spec), "modules": [change.name for change in done.changed]}
    setattr(model.config, NOTE, [*(getattr(model.config, NOTE, None) or []), note])
    if report is not None:
        report.changed += done.changed
        report.left += done.left
    return model


def describe_loaded() -> None:
    """Say what the frozen batch norms of the detectors that are loaded are."""
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("transformers.models."):
            continue
        for name, cls in list(vars(module).items()):  # without waking what is imported lazily
            if name.endswith("FrozenBatchNorm2d") and isinstance(cls, type) and describe_type(cls) is None:
                describe_class(FROZEN, cls)
                cls.eps = 1e-5  # a number in their forward


_repeated: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # norms that are what the config says


def _specs(name: str, notes: list[dict], whole: bool) -> list[str]:
    """What a module was converted to, in this order. Its name may be that in a part of the model that was noted."""
    return [
        note["spec"]
        for note in notes
        if name in note["modules"] or (not whole and any(each.endswith(f".{name}") for each in note["modules"]))
    ]


@functools.wraps(_transformers_post_init)
def _post_init(self: PreTrainedModel) -> None:
    """A model's parts, with the same config, call this before it does."""
    _transformers_post_init(self)
    notes = getattr(self.config, NOTE, None) or []
    if not notes:
        return
    describe_loaded()
    modules = {name: module for name, module in self.named_modules() if name and family(module) is not None}
    whole = any(name in note["modules"] for note in notes for name in modules)
    for name, module in modules.items():
        if module not in _repeated and (specs := _specs(name, notes, whole)):
            for spec in specs:
                module = convert_norm(module, spec, sources=families())
            _repeated.add(module)
            self.set_submodule(name, module)


def register() -> None:
    """Let models whose config says so be built with their norms."""
    PreTrainedModel.post_init = _post_init


def unregister() -> None:
    """Give Transformers its own way of building back; models that are built stay as they are."""
    PreTrainedModel.post_init = _transformers_post_init


describe_loaded()
register_loader("transformers.modeling_utils", describe_loaded)
