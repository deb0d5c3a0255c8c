"""Batch normalization whose scale starts small: the plain form, the forms A1 and A2 it was compared with, and the
normalization of a network's input.

Source: Davis and Frank, "Revisiting Batch Norm Initialization" (2022), sections 3.2, 3.4 and 4.4. Frameworks set scales
to 1 or 0 when they build a model: call :func:`fbn_plugin.apply_gamma_init` on the model afterwards. The paper's slower
learning rate of the scale is the optimizer's part.
"""

import functools
from dataclasses import replace

import torch
from torch import Tensor, nn

from fbn_plugin.layers.batch_norm import FOLDED, AnyDimsMixin, FoldedBatchNormMixin, check_gamma_init
from fbn_plugin.layers.description import NormDescription, plain_sync

RECTIFIED_STD = 0.58  # standard deviation of a rectified unit Gaussian, as the paper rounds it


def _plain(dims: int) -> NormDescription:
    return NormDescription("BN", "channel", dims, synchronized_form=plain_sync)


class _ScaledBatchNorm(FoldedBatchNormMixin):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        gamma_init: float = 0.1,
    ) -> None:
        options = {"device": device, "dtype": dtype, "bias": bias, "gamma_init": gamma_init}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)


_DOC = """Batch normalization over {shape} whose scale starts at ``gamma_init`` (Davis and Frank 2022, section 3.2).

    {equation}

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.{base}`.
        bias: False has a scale and no shift, as newer versions of :class:`torch.nn.{base}` have it.
        gamma_init: what gamma starts at, in (0, 1]; beta starts at 0. The paper tries 0.01 to 1 and finds 0.05 and 0.1
            the best of them.

    Shape:
        input and output {shape}.

    Raises:
        ValueError: ``gamma_init`` out of range; in ``forward``, an input of another rank, or one value per channel in
        training.

    Examples::

        >>> layer = fbn_plugin.{name}(8)
        >>> layer(torch.randn({size})).std().item() < 0.2
        True
    """
_PLAIN = """``y = gamma xhat + beta``, which is :class:`torch.nn.{base}` in all but the start of gamma: the same forward
    pass and ``state_dict`` keys. So weights of one load into the other, and gamma is then theirs."""


class ScaledBatchNorm1d(_ScaledBatchNorm, nn.BatchNorm1d):
    description = _plain(1)
    __doc__ = _DOC.format(
        name="ScaledBatchNorm1d",
        size="4, 8, 16",
        shape="``(N, C)`` or ``(N, C, L)``",
        base="BatchNorm1d",
        equation=_PLAIN.format(base="BatchNorm1d"),
    )


class ScaledBatchNorm2d(_ScaledBatchNorm, nn.BatchNorm2d):
    description = _plain(2)
    __doc__ = _DOC.format(
        name="ScaledBatchNorm2d",
        size="4, 8, 16, 16",
        shape="``(N, C, H, W)``",
        base="BatchNorm2d",
        equation=_PLAIN.format(base="BatchNorm2d"),
    )


class ScaledBatchNorm3d(_ScaledBatchNorm, nn.BatchNorm3d):
    description = _plain(3)
    __doc__ = _DOC.format(
        name="ScaledBatchNorm3d",
        size="4, 8, 4, 16, 16",
        shape="``(N, C, D, H, W)``",
        base="BatchNorm3d",
        equation=_PLAIN.format(base="BatchNorm3d"),
    )


class ScaledBatchNormA1(AnyDimsMixin, ScaledBatchNorm2d):
    __doc__ = _DOC.format(
        name="ScaledBatchNormA1",
        size="4, 8, 16, 16",
        shape="``(N, C, *spatial)``",
        base="BatchNorm2d",
        equation="""``y = gamma (xhat + beta)``, the form A1 of section 4.4, whose scale scales the shift too.

    The ``state_dict`` keys are those of :class:`torch.nn.BatchNorm2d`, but ``bias`` means another thing: the shift of
    the plain form is ``gamma beta``. So weights of the plain form, loaded or converted, make another function here.""",
    )

    description = replace(FOLDED, splits_affine=False)

    def affine_terms(self) -> tuple[Tensor | None, Tensor | None]:
        return self.weight, None if self.bias is None else self.weight * self.bias


class ScaledBatchNormA2(AnyDimsMixin, ScaledBatchNorm2d):
    __doc__ = _DOC.format(
        name="ScaledBatchNormA2",
        size="4, 8, 16, 16",
        shape="``(N, C, *spatial)``",
        base="BatchNorm2d",
        equation="""``y = gamma (lambda xhat + beta)``, the form A2 of section 4.4: A1 with one more learned parameter a
    channel, ``lambd``, which starts at 1 and is absent without ``affine``.

    The paper does not say whether lambda, too, learns more slowly; its method slows down gamma alone.""",
    )

    description = replace(FOLDED, splits_affine=False)

    @functools.wraps(ScaledBatchNorm2d.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.lambd = None if self.weight is None else nn.Parameter(torch.ones_like(self.weight))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if getattr(self, "lambd", None) is not None:  # not there when the base class calls
            nn.init.ones_(self.lambd)

    def affine_terms(self) -> tuple[Tensor | None, Tensor | None]:
        if self.weight is None:
            return None, self.bias
        return self.weight * self.lambd, None if self.bias is None else self.weight * self.bias


class InputNorm2d(FoldedBatchNormMixin, nn.BatchNorm2d):
    """Batch normalization of a network's input, in place of a fixed mean and deviation (Davis and Frank 2022, section
    3.4).

    ``y = gamma xhat``, gamma starting at ``0.58 * gamma_init``: 0.58 is the deviation of a rectified unit Gaussian,
    which is what the network's other layers receive from a norm and a ReLU. There is no shift.

    Args:
        num_features: C.
        eps, momentum, device, dtype: as in :class:`torch.nn.BatchNorm2d`. The paper does not give them; an image
            with values in [0, 1] has a variance far above ``eps``.
        gamma_init: that of the network's other norms, in (0, 1]; the attribute of this name is 0.58 times it, the
            constant that this layer's scale starts at.

    Shape:
        input and output ``(N, C, H, W)``, the input not normalized before.

    Raises:
        ValueError: ``gamma_init`` out of range; in ``forward``, an input of another rank.

    Examples::

        >>> layer = fbn_plugin.InputNorm2d(3)
        >>> layer(torch.rand(4, 3, 16, 16)).std().item() < 0.1
        True
    """

    description = _plain(2)

    def __init__(
        self,
        num_features: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        gamma_init: float = 0.1,
        device=None,
        dtype=None,
    ) -> None:
        scale = RECTIFIED_STD * check_gamma_init(gamma_init)
        super().__init__(num_features, eps, momentum, gamma_init=scale, bias=False, device=device, dtype=dtype)
