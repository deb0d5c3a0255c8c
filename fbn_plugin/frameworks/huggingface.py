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
import json
import sys
from collections.abc import Iterable
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from fbn_plugin.adapters import register_loader
from fbn_plugin.layers.description import FROZEN, describe_class, describe_type, family
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
    **choice: Any,
) -> PreTrainedModel:
    """:func:`fbn_plugin.convert_norm`, noted in ``model.config``, so that ``save_pretrained`` saves it and
    ``from_pretrained`` repeats it in a program that has called ``fbn_plugin.register()``.

    Args:
        model: changed in place.
        spec: such as ``"FBN(t_sigma=4)"``.
        sources: families to replace; here frozen batch norms are among them by default.
        report: is filled with what was changed and what was left; print it.
        **choice: other arguments of :func:`fbn_plugin.convert_norm` by which it chooses norms. They are noted too, so
            they are numbers, strings and lists of them. It chooses again when the model is built, so parameters that
            are frozen after building should be frozen after this call.

    Returns:
        ``model``.

    Raises:
        ValueError: as :func:`fbn_plugin.convert_norm`.
        TypeError: an argument that cannot be written to a config, such as ``recalibrate``; the model is then as it was.

    Examples::

        >>> from transformers import ResNetConfig, ResNetForImageClassification  # doctest: +SKIP
        >>> model = ResNetForImageClassification(ResNetConfig())  # doctest: +SKIP
        >>> model = convert_pretrained(model, "FBN(t_sigma=4)")  # doctest: +SKIP
        >>> model.save_pretrained("folder")  # doctest: +SKIP
    """
    note = {"spec": str(spec), "sources": [sources] if isinstance(sources, str) else list(sources), **choice}
    json.dumps(note)  # what cannot be saved is an error here
    model = convert_norm(model, **note, report=report)
    setattr(model.config, NOTE, [*(getattr(model.config, NOTE, None) or []), note])
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


@functools.wraps(_transformers_post_init)
def _post_init(self: PreTrainedModel) -> None:
    _transformers_post_init(self)
    for note in getattr(self.config, NOTE, None) or []:
        describe_loaded()
        # A model's parts call this before it does, with the same config.
        if any(family(module) in note["sources"] for module in self.modules()):
            convert_norm(self, **note)


def register() -> None:
    """Let models whose config says so be built with their norms."""
    PreTrainedModel.post_init = _post_init


def unregister() -> None:
    """Give Transformers its own way of building back; models that are built stay as they are."""
    PreTrainedModel.post_init = _transformers_post_init


describe_loaded()
register_loader("transformers.modeling_utils", describe_loaded)
