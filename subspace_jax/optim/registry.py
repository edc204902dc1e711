"""Optimizers by name with keyword arguments: what a config may name."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.typing import ArrayLike

from subspace_jax.optim import _checks
from subspace_jax.optim.lora.adaprelora import adaprelora
from subspace_jax.optim.lora.lora_plus import lora_plus
from subspace_jax.optim.lora.lora_pro import lora_pro
from subspace_jax.optim.lora.lora_rite import lora_rite
from subspace_jax.optim.lora.scaled_lora import scaled_adamw_lora, scaled_gd_lora
from subspace_jax.optim.manifold.riemannian_adam import riemannian_adam
from subspace_jax.optim.manifold.riemannian_sgd import riemannian_sgd
from subspace_jax.optim.projected.apollo import apollo
from subspace_jax.optim.projected.coso import coso
from subspace_jax.optim.projected.fira import fira
from subspace_jax.optim.projected.galore import galore
from subspace_jax.optim.projected.online_subspace import online_subspace_descent
from subspace_jax.optim.projected.options import RankRule

# Arguments that a config can't express, or that come from elsewhere.
_NOT_IN_KWARGS = {
    *("learning_rate", "mask", "pairs", "fallback", "inner", "nesterov"),
    "weight_dimension_numbers",
}
_RANKS = ("rank", "proj_rank")
# Biases of stacked layers look like matrices, and rows of an embedding table that no token selects have no gradient.
_NO_KERNELS = ("bias", "scale", "embedding", "magnitude", "bases")


class Optimizer(NamedTuple):
    """An optimizer that a config may name.

    Attributes:
      build: Returns the transform; takes ``learning_rate``, and ``mask`` where its weight decay has one.
      defaults: Keyword arguments where a config says nothing, if they are not those of ``build``.
    """

    build: Callable[..., optax.GradientTransformation]
    defaults: Mapping[str, Any] = {}

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that a config may give, and their defaults."""
        found = {name: p.default for name, p in inspect.signature(self.build).parameters.items()}
        return {name: self.defaults.get(name, found[name]) for name in found if name not in _NOT_IN_KWARGS}

    @property
    def takes_mask(self) -> bool:
        """Whether weight decay can leave parameters out."""
        return "mask" in inspect.signature(self.build).parameters


def make(
    optimizer: Optimizer, learning_rate: optax.ScalarOrSchedule, kwargs: Mapping[str, Any], **more: Any
) -> optax.GradientTransformation:
    """Builds an optimizer from the keyword arguments of a config.

    Args:
      optimizer: Entry of :data:`OPTIMIZERS` or :data:`MANIFOLD_OPTIMIZERS`.
      learning_rate: Fixed learning rate or schedule.
      kwargs: See :meth:`Optimizer.arguments`.  Ranks are integers, or shares below 1 of a kernel's shorter side, and
        apply to kernels: biases, norms and embedding tables are not projected.
      **more: Other arguments of ``build``.

    Raises:
      ValueError: An argument is unknown (the nearest known one is named) or its value can't serve.
    """
    known = optimizer.arguments()
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(str(name)[:100], known, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name}: unknown argument, expected one of {tuple(known)}{hint}")
        _check_like(name, kwargs[name], known[name])
    values = {**optimizer.defaults, **kwargs}
    values |= {name: kernel_rank(values.get(name, known[name]), name) for name in _RANKS if name in known}
    try:
        return optimizer.build(learning_rate, **values, **more)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _check_like(name: str, value: Any, default: Any) -> None:
    """Checks that a value is a number, a truth value or a short name where the default is one."""
    shown = repr(value)[:100]
    if isinstance(default, bool):
        fits, what = isinstance(value, bool), "True or False"
    elif isinstance(default, int | float):
        fits, what = value is None or (isinstance(value, int | float) and not isinstance(value, bool)), "a number"
    else:
        fits, what = not isinstance(default, str) or (isinstance(value, str) and len(value) < len(shown)), "a name"
    if not fits:
        raise ValueError(f"{name}: expected {what}, got {shown}")


def kernel_rank(rank: float, name: str = "rank") -> RankRule:
    """A rule that gives kernels a rank: an integer, or a share below 1 of the shorter side.

    Raises:
      ValueError: It is neither.
    """
    share = isinstance(rank, float) and 0 < rank < 1
    if not share and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(
            f"{name}: expected an integer of at least 1, or a share of the shorter side below 1, got {rank!r}"
        )

    def rule(path: str, shape: tuple[int, ...]) -> int | None:
        if len(shape) < 2 or path.split("/")[-1] in _NO_KERNELS:
            return None
        return max(1, int(rank * min(shape[-2:]))) if share else rank

    return rule


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: ArrayLike = 0.9,
    weight_decay: ArrayLike = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """``optax.sgd`` with coupled weight decay."""
    _checks.check_number("momentum", momentum, 0, 1)
    _checks.check_number("weight_decay", weight_decay, 0)
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.sgd(learning_rate, momentum=momentum))


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """``optax.adam`` with coupled weight decay."""
    _checks.check_moments(b1, b2, eps)
    _checks.check_number("weight_decay", weight_decay, 0)
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.adam(learning_rate, b1=b1, b2=b2, eps=eps))


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """``optax.adamw``, by default without weight decay."""
    _checks.check_moments(b1, b2, eps)
    _checks.check_number("weight_decay", weight_decay, 0)
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)


def lamb(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    weight_decay: ArrayLike = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """``optax.lamb``."""
    _checks.check_moments(b1, b2, eps)
    _checks.check_number("weight_decay", weight_decay, 0)
    return optax.lamb(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    beta: ArrayLike = 0.95,
    ns_steps: int = 5,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    consistent_rms: float = 0.2,
) -> optax.GradientTransformation:
    """``optax.contrib.muon`` for kernels, stacks of layers included; all other parameters by AdamW.

    With ``consistent_rms`` 0.2 a step has the size of Adam's, so that learning rates of Adam serve.
    """
    _checks.check_number("beta", beta, 0, 1)
    _checks.check_number("eps", eps, 0)
    _checks.check_number("weight_decay", weight_decay, 0)
    _checks.check_number("consistent_rms", consistent_rms, 0)
    _checks.check_number("ns_steps", ns_steps, 1)
    is_kernel = kernel_rank(1)

    def dimension_numbers(params):
        def of_leaf(path, x):
            kernel = is_kernel(_checks.path_name(path), x.shape) is not None
            return optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1) if kernel else None

        return jax.tree_util.tree_map_with_path(of_leaf, params)

    return optax.contrib.muon(
        learning_rate,
        ns_steps=ns_steps,
        beta=beta,
        eps=eps,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        consistent_rms=consistent_rms,
        muon_weight_dimension_numbers=dimension_numbers,
    )


_QUARTER = {"rank": 0.25, "scale": 1.0}

OPTIMIZERS: Mapping[str, Optimizer] = {
    "sgd": Optimizer(sgd),
    "adam": Optimizer(adam),
    "adamw": Optimizer(adamw),
    "lamb": Optimizer(lamb),
    "muon": Optimizer(muon),
    "galore": Optimizer(galore, _QUARTER),
    "fira": Optimizer(fira, _QUARTER),
    "apollo": Optimizer(apollo, _QUARTER),
    "apollo_mini": Optimizer(apollo, {"rank": 1, "scaling": "tensor", "scale": 128.0}),
    "online_subspace_descent": Optimizer(online_subspace_descent, _QUARTER),
    "coso": Optimizer(coso, {"proj_rank": 0.25, "sketch_rank": 64}),
    "lora_plus": Optimizer(lora_plus),
    "scaled_gd_lora": Optimizer(scaled_gd_lora),
    "scaled_adamw_lora": Optimizer(scaled_adamw_lora),
    "lora_rite": Optimizer(lora_rite),
    "lora_pro": Optimizer(lora_pro, {"scale": 2.0}),
    "adaprelora": Optimizer(adaprelora, {"scale": 2.0, "stats": "projected"}),
}
MANIFOLD_OPTIMIZERS: Mapping[str, Optimizer] = {
    "riemannian_sgd": Optimizer(riemannian_sgd),
    "riemannian_adam": Optimizer(riemannian_adam),
}
