"""Convolutional networks and Swin transformers as Flax modules that hold what the pure functions take."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from subspace_jax.nn.models.causal_lm.module import arrays_of
from subspace_jax.nn.models.resnet.config import ResNetConfig
from subspace_jax.nn.models.resnet.model import resnet_apply, resnet_axes, resnet_init
from subspace_jax.nn.models.swin.config import SwinConfig
from subspace_jax.nn.models.swin.model import swin_apply, swin_axes, swin_init
from subspace_jax.nn.models.vgg import VGGConfig, vgg_apply, vgg_axes, vgg_init
from subspace_jax.nn.models.vision_output import VisionOutput

PyTree = Any


class ResNet(nnx.Module):
    """A residual network that holds its parameters and running statistics; all else is :func:`resnet_apply`.

    It begins in evaluation mode; ``train()`` and ``eval()`` switch.  In training mode a call updates the running
    statistics, variables of type ``nnx.BatchStat``, in place.

    Args:
      config: The network.
      params: Its parameters; drawn from ``rngs`` where None.
      batch_stats: Its running statistics, with ``params``.
      dtype: Type of the activations, that of the images by default.
      param_dtype: Type of drawn parameters.
      rngs: Source of randomness; its ``params`` stream is used.

    Raises:
      ValueError: Neither ``params`` and ``batch_stats`` nor ``rngs`` are given.
    """

    def __init__(
        self,
        config: ResNetConfig,
        params: PyTree | None = None,
        batch_stats: PyTree | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if params is None:
            params, batch_stats = resnet_init(_key(rngs, "ResNet"), config, param_dtype)
        self.config, self.dtype, self.out_features = config, dtype, config.out_features
        self.use_running_average = self.deterministic = True
        _hold(self, params, batch_stats, resnet_axes(config))

    @property
    def params(self) -> PyTree:
        """The parameters, as :func:`resnet_apply` takes them."""
        return arrays_of(self.weights)

    @property
    def batch_stats(self) -> PyTree:
        """The running statistics, as :func:`resnet_apply` takes them."""
        return arrays_of(self.statistics)

    def __call__(self, pixels: jax.Array, **options) -> VisionOutput:
        """Returns what :func:`resnet_apply` returns in this mode, with its options."""
        return _run(resnet_apply, self, pixels, options)


class VGG(nnx.Module):
    """A VGG network that holds its parameters and running statistics; all else is :func:`vgg_apply`.

    Modes, arguments and calls are those of :class:`ResNet`.
    """

    def __init__(
        self,
        config: VGGConfig,
        params: PyTree | None = None,
        batch_stats: PyTree | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if params is None:
            params, batch_stats = vgg_init(_key(rngs, "VGG"), config, param_dtype)
        self.config, self.dtype, self.out_features = config, dtype, config.out_features
        self.use_running_average = self.deterministic = True
        _hold(self, params, batch_stats, vgg_axes(config))

    @property
    def params(self) -> PyTree:
        """The parameters, as :func:`vgg_apply` takes them."""
        return arrays_of(self.weights)

    @property
    def batch_stats(self) -> PyTree:
        """The running statistics, as :func:`vgg_apply` takes them."""
        return arrays_of(self.statistics)

    def __call__(self, pixels: jax.Array, **options) -> VisionOutput:
        """Returns what :func:`vgg_apply` returns in this mode, with its options."""
        return _run(vgg_apply, self, pixels, options)


class SwinTransformer(nnx.Module):
    """A Swin transformer that holds its parameters; all else is :func:`swin_apply`.

    It begins in evaluation mode; ``train()`` and ``eval()`` switch whether branches are dropped.

    Args:
      config: The model.
      params: Its parameters; drawn from ``rngs`` where None.
      dtype: Type of the activations, that of the images by default.
      param_dtype: Type of drawn parameters.
      rngs: Source of randomness; its ``params`` stream is used.

    Raises:
      ValueError: Neither ``params`` nor ``rngs`` is given.
    """

    def __init__(
        self,
        config: SwinConfig,
        params: PyTree | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if params is None:
            params = swin_init(_key(rngs, "SwinTransformer"), config, param_dtype)
        self.config, self.dtype, self.out_features = config, dtype, config.out_features
        self.deterministic = True
        self.weights = _variables(params, swin_axes(config), nnx.Param)

    @property
    def params(self) -> PyTree:
        """The parameters, as :func:`swin_apply` takes them."""
        return arrays_of(self.weights)

    def __call__(self, pixels: jax.Array, **options) -> VisionOutput:
        """Returns what :func:`swin_apply` returns in this mode, with its options."""
        options = {"train": not self.deterministic, "dtype": self.dtype, **options}
        return swin_apply(self.config, self.params, pixels, **options)


def _key(rngs: nnx.Rngs | None, name: str) -> jax.Array:
    if rngs is None:
        raise ValueError(f"{name}: expected params, or rngs to draw them from")
    return rngs.params()


def _hold(module: nnx.Module, params: PyTree, batch_stats: PyTree | None, axes: tuple[PyTree, PyTree]) -> None:
    if batch_stats is None:
        raise ValueError(f"{type(module).__name__}: expected batch_stats beside params, got None")
    module.weights = _variables(params, axes[0], nnx.Param)
    module.statistics = _variables(batch_stats, axes[1], nnx.BatchStat)


def _variables(tree: PyTree, axes: PyTree, kind: type[nnx.Variable]) -> PyTree:
    if isinstance(tree, dict):
        return nnx.Dict({name: _variables(part, axes[name], kind) for name, part in tree.items()})
    return kind(tree, axes=tuple(axes))


def _update(variables: PyTree, values: PyTree | None) -> None:
    if isinstance(variables, nnx.Variable):
        if values is not None:
            variables.set_value(values)
    elif values is not None:
        for name, part in variables.items():
            _update(part, values[name])


def _run(apply: Callable[..., VisionOutput], module: nnx.Module, pixels: jax.Array, options: dict) -> VisionOutput:
    mode = {
        "train": not (module.use_running_average and module.deterministic),
        "frozen_stats": module.use_running_average,
        "dtype": module.dtype,
    }
    out = apply(module.config, module.params, module.batch_stats, pixels, **{**mode, **options})
    _update(module.statistics, out.batch_stats)
    return out
