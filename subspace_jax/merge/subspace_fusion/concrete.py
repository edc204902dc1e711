"""Masks of task vectors and merging coefficients, learned from the entropy of predictions (arXiv 2312.06173)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax.merge.subspace_fusion.core import apply_task_vectors, rescale, wide

PyTree = Any
Apply = Callable[[PyTree, Any], jax.Array]
Noise = Callable[[PyTree], PyTree]  # from mask logits to uniform numbers of their shapes
MaskMode = Literal["sample", "mean", "hard"]
Metrics = dict[str, jax.Array]


class Fusion(NamedTuple):
    """What is merged.

    Attributes:
      base: Parameters.
      taus: Task vectors, see :func:`task_vectors`; bfloat16 serves.
      mask: A mask that is fixed, see :func:`concrete_mask`, or None.
    """

    base: PyTree
    taus: tuple[PyTree, ...]
    mask: PyTree | None = None


class ConcreteSettings(NamedTuple):
    """Constants of the steps.

    Attributes:
      lam: Coefficient of each task vector; where coefficients are trained, the one that they start at.
      temperature: Of the relaxed mask.
      clamp: Whether trained coefficients are clipped to [0, 1] before use.
    """

    lam: float = 0.3
    temperature: float = 0.5
    clamp: bool = False


DEFAULTS = ConcreteSettings()


class Optimizers(NamedTuple):
    """Optax transforms of mask logits and of coefficients; None where they are not trained."""

    mask: optax.GradientTransformation | None = None
    lam: optax.GradientTransformation | None = None


class ConcreteState(NamedTuple):
    """State of the steps.

    Attributes:
      logits: Mask logits, with the structure of a task vector, or None without a mask.
      lam: Coefficients: ``[T]``, or a tree with ``[T]`` for each leaf.
      opt_states: States of both optimizers, None where there is none.
      step: Steps taken, int32.
    """

    logits: PyTree
    lam: PyTree
    opt_states: Optimizers
    step: jax.Array


def concrete_init(
    taus: Sequence[PyTree], txs: Optimizers, *, layerwise: bool = True, settings: ConcreteSettings = DEFAULTS
) -> ConcreteState:
    """The state before the first step: logits 0, and equal coefficients.

    Args:
      taus: Task vectors.
      txs: Optimizers of what is trained.
      layerwise: Whether there is a coefficient for each task and leaf, or for each task.
      settings: Constants.

    Returns:
      The state; logits are float32 or of the task vectors' dtype if wider.

    Raises:
      ValueError: There is no task vector, or a constant is out of range.
    """
    if not taus:
        raise ValueError("taus: expected at least one task vector, got none")
    check_temperature(settings.temperature)
    lam = initial_lam(taus, settings.lam, layerwise=layerwise)
    logits = None
    if txs.mask is not None:
        logits = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x)), taus[0])
    states = Optimizers(
        None if txs.mask is None else txs.mask.init(logits), None if txs.lam is None else txs.lam.init(lam)
    )
    return ConcreteState(logits, lam, states, jnp.zeros((), jnp.int32))


def initial_lam(taus: Sequence[PyTree], value: float, *, layerwise: bool) -> PyTree:
    """Equal coefficients, ``[T]`` or a tree with ``[T]`` for each leaf."""
    dtype = wide(jax.tree.leaves(taus[0])[0])

    def full(_=None):
        return jnp.full(len(taus), value, dtype)

    return jax.tree.map(full, taus[0]) if layerwise else full()


def concrete_mask(logits: PyTree, key: jax.Array, temperature: float = 0.5, mode: MaskMode = "sample") -> PyTree:
    """A mask of relaxed Bernoulli variables, ``sigmoid((log u - log(1 - u) + logits) / temperature)``.

    Args:
      logits: Mask logits, an array or a tree.
      key: Random key; leaf ``i`` uses ``fold_in(key, i)``, and the draw does not depend on a mesh.
      temperature: Above 0; low ones bring the entries to 0 and 1.
      mode: "sample"; "mean" for ``sigmoid(logits)``, which uses neither key nor temperature; or "hard", 1 where a
        sample is above 0.5 and else 0, a Bernoulli variable of that mean.

    Returns:
      Entries from 0 to 1, in the shapes and dtypes of the logits.

    Raises:
      ValueError: The temperature is not above 0, or the mode unknown.
    """
    check_temperature(temperature)
    if mode not in get_args(MaskMode):
        raise ValueError(f"mode: expected one of {list(get_args(MaskMode))}, got {mode!r}")
    if mode == "mean":
        return jax.tree.map(jax.nn.sigmoid, logits)
    return mask_of_noise(logits, draw_noise(key)(logits), temperature, hard=mode == "hard")


def rescale_mask(mask: PyTree) -> PyTree:
    """Divides each leaf of a mask by its mean, through which gradients flow; a leaf of zeros stays one."""
    return jax.tree.map(rescale, mask)


def mask_task_vectors(taus: Sequence[PyTree], mask: PyTree) -> tuple[PyTree, ...]:
    """Task vectors times a mask over its mean, leaf by leaf.

    Merging needs no such copies: :func:`apply_task_vectors` takes the mask.

    Args:
      taus: Of :func:`task_vectors`.
      mask: Of :func:`concrete_mask`.
    """
    scales = rescale_mask(mask)
    return tuple(jax.tree.map(lambda x, m: x * m.astype(x.dtype), tau, scales) for tau in taus)


def prediction_entropy(logits: jax.Array) -> jax.Array:
    """The entropy of the predicted distribution, in nats.

    Args:
      logits: ``[..., classes]``.

    Returns:
      ``[...]``, float32 or wider.
    """
    found = jax.nn.log_softmax(logits.astype(wide(logits)))
    return -jnp.sum(jnp.exp(found) * found, axis=-1)


def entropy_objective(apply_fns: Sequence[Apply], params: PyTree, batches: Sequence[Any]) -> jax.Array:
    """The entropy of a merged model's predictions, a mean over each batch, summed over tasks.

    Args:
      apply_fns: For each task, a function of parameters and a batch to logits ``[examples, ..., classes]``; a head that
        is the task's own belongs into it.
      params: The merged parameters.
      batches: A batch for each task.

    Raises:
      ValueError: The numbers of functions and batches differ.
    """
    return jnp.sum(task_entropies(apply_fns, params, batches))


def task_entropies(apply_fns: Sequence[Apply], params: PyTree, batches: Sequence[Any]) -> jax.Array:
    """The mean entropy of each task, ``[T]``; see :func:`entropy_objective`."""
    if len(apply_fns) != len(batches):
        raise ValueError(f"batches: expected one for each of {len(apply_fns)} tasks, got {len(batches)}")
    means = [jnp.mean(prediction_entropy(f(params, x))) for f, x in zip(apply_fns, batches, strict=True)]
    return jnp.stack(means)


def merge_masked(
    fusion: Fusion, lam: PyTree, logits: PyTree | None, noise: Noise | None, settings: ConcreteSettings
) -> PyTree:
    """The merged parameters, recomputed in the backward pass: neither mask nor noise is kept for it."""

    def merged(lam, logits):
        mask = fusion.mask
        if logits is not None:
            mask = mask_of_noise(logits, noise(logits), settings.temperature)
        return apply_task_vectors(fusion.base, fusion.taus, lam, mask=mask)

    return jax.checkpoint(merged)(lam, logits)


def concrete_task_arithmetic_step(
    state: ConcreteState,
    batches: Sequence[Any],
    key: jax.Array,
    *,
    fusion: Fusion,
    apply_fns: Sequence[Apply],
    txs: Optimizers,
    settings: ConcreteSettings = DEFAULTS,
) -> tuple[ConcreteState, Metrics]:
    """One step of Concrete Task Arithmetic: the mask is trained, the coefficients of the state stay.

    Args:
      state: Of :func:`concrete_init`.
      batches: A batch for each task.
      key: Random key of the mask.
      fusion: What is merged.
      apply_fns: See :func:`entropy_objective`.
      txs: The optimizer of the mask.
      settings: Constants.

    Returns:
      The new state, and ``loss`` and ``entropies`` ``[T]`` as metrics.
    """
    return mask_step(state, batches, draw_noise(key), fusion, apply_fns, txs, settings)


def concrete_adamerging_step(
    state: ConcreteState,
    batches: tuple[Sequence[Any], Sequence[Any]],
    key: jax.Array,
    *,
    fusion: Fusion,
    apply_fns: Sequence[Apply],
    txs: Optimizers,
    settings: ConcreteSettings = DEFAULTS,
) -> tuple[ConcreteState, Metrics]:
    """One step of Concrete AdaMerging, first order: coefficients from their start by one step, then the mask.

    The coefficients begin at ``settings.lam`` each time, while their optimizer's state goes on; the mask's gradient
    takes them as constants.  Both parts draw a mask of their own.

    Args:
      state: Of :func:`concrete_init`.
      batches: For both parts, a batch for each task.
      key: See :func:`concrete_task_arithmetic_step`, as for the other arguments.
      fusion: What is merged.
      apply_fns: See there.
      txs: Optimizers of mask and coefficients.
      settings: Constants.

    Returns:
      The new state, with the coefficients after their step, and metrics: ``loss``, ``entropies`` and ``inner_loss``.
    """
    inner, outer = jax.random.split(key)
    state, found = inner_step(state, batches[0], draw_noise(inner), fusion, apply_fns, txs, settings)
    state, metrics = mask_step(state, batches[1], draw_noise(outer), fusion, apply_fns, txs, settings)
    return state, metrics | {"inner_loss": found["loss"]}


def adamerging_step(
    state: ConcreteState,
    batches: Sequence[Any],
    key: jax.Array,
    *,
    fusion: Fusion,
    apply_fns: Sequence[Apply],
    txs: Optimizers,
    settings: ConcreteSettings = DEFAULTS,
) -> tuple[ConcreteState, Metrics]:
    """One step of AdaMerging (arXiv 2310.02575): the coefficients are trained, with the mask of ``fusion`` or none.

    With a mask that :func:`concrete_mask` has drawn once, this is test-time adaptation after Concrete AdaMerging.

    Args:
      state: Of :func:`concrete_init`.
      batches: A batch for each task.
      key: Not used.
      fusion: What is merged.
      apply_fns: See :func:`entropy_objective`.
      txs: The optimizer of the coefficients.
      settings: Constants.

    Returns:
      The new state, and ``loss`` and ``entropies`` as metrics.
    """
    del key
    return _lam_step(state, batches, fusion, None, apply_fns, txs, settings)


def mask_step(state, batches, noise: Noise, fusion, apply_fns, txs, settings) -> tuple[ConcreteState, Metrics]:
    """One step on the mask, with noise from a function of the logits; arguments: see the public steps."""
    lam = jax.lax.stop_gradient(used_lam(state.lam, settings))

    def loss(logits):
        found = task_entropies(apply_fns, merge_masked(fusion, lam, logits, noise, settings), batches)
        return jnp.sum(found), found

    (value, found), gradients = jax.value_and_grad(loss, has_aux=True)(state.logits)
    updates, opt_state = txs.mask.update(gradients, state.opt_states.mask, state.logits)
    logits = optax.apply_updates(state.logits, updates)
    states = state.opt_states._replace(mask=opt_state)
    return ConcreteState(logits, state.lam, states, state.step + 1), {"loss": value, "entropies": found}


def inner_step(state, batches, noise: Noise, fusion, apply_fns, txs, settings) -> tuple[ConcreteState, Metrics]:
    """One step on the coefficients from their start, with a mask drawn from noise; does not count as a step."""
    start = jax.tree.map(lambda x: jnp.full_like(x, settings.lam), state.lam)
    new, metrics = _lam_step(state._replace(lam=start), batches, fusion, noise, apply_fns, txs, settings)
    return new._replace(step=state.step), metrics


def _lam_step(state, batches, fusion, noise, apply_fns, txs, settings) -> tuple[ConcreteState, Metrics]:
    logits = None if noise is None else jax.lax.stop_gradient(state.logits)

    def loss(lam):
        params = merge_masked(fusion, used_lam(lam, settings), logits, noise, settings)
        found = task_entropies(apply_fns, params, batches)
        return jnp.sum(found), found

    (value, found), gradients = jax.value_and_grad(loss, has_aux=True)(state.lam)
    updates, opt_state = txs.lam.update(gradients, state.opt_states.lam, state.lam)
    lam = optax.apply_updates(state.lam, updates)
    states = state.opt_states._replace(lam=opt_state)
    return ConcreteState(state.logits, lam, states, state.step + 1), {"loss": value, "entropies": found}


def used_lam(lam: PyTree, settings: ConcreteSettings) -> PyTree:
    """The coefficients as they are used: clipped where that is asked for, with the gradient passed at the bounds."""

    def clip(x):
        return jnp.where((x < 0) | (x > 1), jax.lax.stop_gradient(jnp.clip(x, 0, 1)), x)

    return jax.tree.map(clip, lam) if settings.clamp else lam


def draw_noise(key: jax.Array) -> Noise:
    """Returns a function that draws numbers from 0 to 1 for each entry of mask logits."""

    def draw(logits: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(logits)
        drawn = [jax.random.uniform(jax.random.fold_in(key, i), x.shape, x.dtype) for i, x in enumerate(leaves)]
        return treedef.unflatten(drawn)

    return draw


def mask_of_noise(logits: PyTree, noise: PyTree, temperature: float, *, hard: bool = False) -> PyTree:
    """The mask for uniform noise, see :func:`concrete_mask`; noise of exactly 0 or 1 is moved inwards."""

    def leaf(phi, u):
        eps = np.asarray(jnp.finfo(u.dtype).eps, u.dtype)
        u = jnp.clip(u, eps, 1 - eps)
        x = jnp.log(u) - jnp.log1p(-u) + phi
        return (x > 0).astype(x.dtype) if hard else jax.nn.sigmoid(x / np.asarray(temperature, x.dtype))

    return jax.tree.map(leaf, logits, noise)


def check_temperature(temperature: float) -> None:
    """Raises ValueError for a temperature that is not above 0."""
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
