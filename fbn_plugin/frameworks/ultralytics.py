"""Ultralytics: norms in the models that its trainers build.

``YOLO.train()`` builds its model anew from a YAML file or from what a checkpoint says of itself (``get_model`` of the
trainer, in ultralytics/engine/model.py and trainer.py, read in 8.4.190), with plain batch norms; one that was converted
is left behind. A callback is no remedy: at ``on_pretrain_routine_end`` the optimizer exists already, and so does the
moving average of the weights, which is what is saved, and ``on_pretrain_routine_start`` is not called in all processes
of a run on several GPUs. So a norm gets in by a trainer class, for which ``train(trainer=...)`` is the public way. It
converts the model as soon as it is built, and it travels to every process with all that it needs.

- :func:`norm_trainer` makes such a class for a norm.
- After ``fbn_plugin.register()``, ``train()`` takes one by itself if the model it is called on, or the checkpoint that
  it resumes, has norms of this package. Loading a checkpoint of such a run is enough for that.
"""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path

from torch import nn
from ultralytics.engine.model import Model

from fbn_plugin.layers.description import describe, evaluates_by_constants, family
from fbn_plugin.registry import NormSpec, norm_factory, parse_spec, registered_name
from fbn_plugin.surgery.convert import convert_norm
from fbn_plugin.surgery.norm_summary import norm_kind, norm_settings

_ultralytics_train = Model.train


def norm_trainer(model: Model, spec: str, trainer: type | None = None) -> type:
    """A trainer class whose models have the norm that ``spec`` names in the place of batch normalization.

    Each norm keeps ``eps`` and ``momentum`` of the one that it replaces, unless the spec sets them.

    Args:
        model: the ``YOLO`` or ``RTDETR`` that is to be trained.
        spec: such as ``"FBN(t_sigma=4)"``.
        trainer: the class to derive from; None is the one that the model's task has.

    Returns:
        What ``model.train(trainer=...)`` takes. On several GPUs all processes use it.

    Raises:
        ValueError: a bad spec, or a norm whose weight and running statistics are not all that it does in evaluation:
            ultralytics multiplies these into convolutions before it validates, predicts or exports.

    Examples::

        >>> from ultralytics import YOLO  # doctest: +SKIP
        >>> model = YOLO("yolo11n.yaml")  # doctest: +SKIP
        >>> model.train(trainer=norm_trainer(model, "FBN"), data="coco8.yaml", epochs=3)  # doctest: +SKIP
    """
    spec = parse_spec(spec)
    _check(norm_factory(spec)(32), str(spec))
    return _trainer_class(_base(model) if trainer is None else trainer, functools.partial(_convert_all, str(spec)))


def _base(model: Model) -> type:
    return model.task_map[model.task]["trainer"]


def _check(norm: nn.Module, name: str) -> None:
    description = describe(norm)
    by_constants = evaluates_by_constants(norm) and getattr(norm, "running_mean", None) is not None
    if not by_constants or not description.keeps_meaning:
        reason = "its scale is more than its weight" if by_constants else "it has no running statistics that say all"
        raise ValueError(
            f"{name} cannot be trained by ultralytics, which folds norms into convolutions before it validates, "
            f"predicts or exports: {reason}. FBN, SyncFBN, ScaledBN, ConvNorm and BN can"
        )


def _convert_all(spec: str, model: nn.Module, weights: nn.Module | None) -> None:
    convert_norm(model, spec)


def _trainer_class(base: type, put_norms: Callable[[nn.Module, nn.Module | None], None]) -> type:
    """``base`` whose models get their norms from ``put_norms(model, weights)``, before anything else sees them."""

    class NormTrainer(base):
        def get_model(self, cfg=None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
            model = super().get_model(cfg=cfg, weights=weights, verbose=verbose)
            keys = set(model.state_dict())
            put_norms(model, weights)
            if weights and set(model.state_dict()) - keys:  # for parameters that batch normalization does not have
                model.load(weights, verbose=False)
            for name in norms_of(model):
                model.get_submodule(name).keeps_norms = _KeepsNorms()
            return model

    NormTrainer.__name__ = NormTrainer.__qualname__ = f"Norm{base.__name__}"
    NormTrainer.__doc__ = f"{base.__name__} whose models have norms of fbn_plugin."
    return NormTrainer


class _KeepsNorms:
    """What the norms of a trained model carry into its checkpoints, so that ``YOLO("last.pt").train(resume=True)``
    keeps them in a program that knows nothing of them: where it is loaded, :func:`register` is called."""

    def __reduce__(self) -> tuple:
        return _registered, ()

    def __deepcopy__(self, memo: dict) -> "_KeepsNorms":
        return self


def _registered() -> _KeepsNorms:
    register()
    return _KeepsNorms()


def norms_of(model: nn.Module | None) -> dict[str, str]:
    """The norms of this package in a model, and registered ones of yours: name of the module -> spec that builds it,
    with all options, as a conversion takes what a spec leaves out from the norm before."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return {name: str(NormSpec(norm_kind(norm), norm_settings(norm))) for name, norm in modules if _is_ours(norm)}


def _is_ours(module: nn.Module) -> bool:
    return registered_name(type(module)) is not None and family(module) is not None


def _put_same(norms: dict[str, str], model: nn.Module, weights: nn.Module | None) -> None:
    """Give a model that was built anew the norms of the weights that it gets, or else ``norms``."""
    lost = 0
    for name, spec in (norms_of(weights) or norms).items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            lost += 1
            continue
        model.set_submodule(name, convert_norm(old, spec))
    if lost:
        what = "norms of the model before have" if lost > 1 else "norm of the model before has"
        warnings.warn(f"{lost} {what} no place in the one that is trained", stacklevel=2)


def _train(self: Model, trainer: type | None = None, **kwargs):
    norms = norms_of(self.model)
    if trainer is None and (norms or isinstance(kwargs.get("resume"), str | Path)):
        for name in norms:
            _check(self.model.get_submodule(name), registered_name(type(self.model.get_submodule(name))))
        trainer = _trainer_class(_base(self), functools.partial(_put_same, norms))
    return _ultralytics_train(self, trainer=trainer, **kwargs)


functools.update_wrapper(_train, _ultralytics_train)


def register() -> None:
    """Let ``train()`` keep the norms of the model that it is called on, and of a checkpoint that it resumes."""
    Model.train = _train


def unregister() -> None:
    """Give ultralytics its own ``train`` back."""
    Model.train = _ultralytics_train
