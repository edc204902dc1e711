"""Adapters of a tree of parameters: init, bind, materialize, merge and unmerge."""

import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from subspace_jax.adapters.config import AdapterConfig
from subspace_jax.adapters.gradient_probes import PROBES, probe_axes
from subspace_jax.adapters.rules import adapters_of, insert, match_rules, path_of
from subspace_jax.adapters.structured import as_dense, axes_of, is_structured

PyTree = Any
Rules = Mapping[str | re.Pattern, AdapterConfig]


def init(key: jax.Array, params: PyTree, settings: Rules) -> PyTree:
    """Draws adapters for the weights that the rules match.

    Weights are floating-point leaves ``[..., in, out]``; leading axes are stacked weights, each with an adapter of its
    own, unless the config counts them as a convolution's window (``window`` of LoRA and DoRA, the number of ranks of
    FLoRA).  Leaves called ``scale`` or ``bias`` and vectors are no weights, except for :class:`Full` and for
    :class:`FLoRA` of one rank.  Weights of :func:`quantize` may be adapted too.

    Args:
      key: Random key.  The values of an adapter depend only on it and on the path and shape of the weight.
      params: Any tree of arrays: nested dicts, ``nnx.State``, Linen variables.
      settings: Rule to adapter config; see :func:`match_rules`.  The first rule that matches counts.

    Returns:
      The trainable tree, a nested dict: at the path of each weight a dict of its adapter's arrays, float32 (float64
      for float64 weights).

    Raises:
      ValueError: A rule matches nothing, or a config changes the frozen weight and needs :func:`prepare`.
      TypeError: A weight is not floating point.
    """
    _check_settings(settings)
    for config in settings.values():
        if not config.keeps_base:
            raise ValueError(f"settings: {config} changes the frozen weight or factors it; call prepare instead")
    return prepare(key, params, settings)[1]


def prepare(
    key: jax.Array, params: PyTree, settings: Rules, *, gradients: PyTree | None = None
) -> tuple[PyTree, PyTree]:
    """Draws adapters, and computes the frozen tree.

    For most configs the frozen tree is the parameters; for PiSSA and LoRA-GA the weight less the update at the start;
    for the spectral methods the weight with its singular vectors.  All later functions take it in place of ``params``.
    Keep it, or its seed, in a checkpoint: singular vectors of equal singular values are not unique.

    Args:
      key: See :func:`init`.
      params: See :func:`init`.
      settings: See :func:`init`.
      gradients: Gradient of the loss over some batches, with the structure of ``params``, for LoRA-GA.

    Returns:
      The frozen tree, and the trainable tree.

    Raises:
      ValueError: A rule matches nothing, or a config does not fit its weight.
      TypeError: A weight is not floating point, or is quantized and would have to be factored or trained.
    """
    _check_settings(settings)
    treedef = jax.tree_util.tree_structure(params, is_leaf=is_structured)
    gradient_at = {} if gradients is None else bases_of(gradients)
    weights, chosen = bases_of(params), adapted_weights(params, settings)
    base, trainable = [], {}
    for path, w in weights.items():
        if path not in chosen:
            base.append(w)
            continue
        if not jnp.issubdtype(w.dtype, jnp.floating):
            raise TypeError(f"{path}: expected a floating-point weight, got {w.dtype}")
        config = chosen[path]
        if is_structured(w) and not (config.quantizable_base and config.keeps_base):
            raise TypeError(f"{path}: {config} factors or trains the weight, which is quantized")
        table = path.split("/")[-1] == "embedding"
        frozen, arrays = config.initialize(_key_at(key, path), w, table=table, gradient=gradient_at.get(path))
        base.append(frozen)
        insert(trainable, path, arrays)
    return jax.tree_util.tree_unflatten(treedef, base), trainable


def adapted_weights(params: PyTree, settings: Rules, *, name: str = "settings") -> dict[str, AdapterConfig]:
    """Returns the config of each weight that the rules match, by path.

    Args:
      params: See :func:`init`.
      settings: See :func:`init`.
      name: Name of the argument in the messages of errors.

    Raises:
      ValueError: A rule matches nothing.
    """
    weights = bases_of(params)
    return match_rules(settings, weights, lambda path, config: config.admits(path, weights[path].ndim), name=name)


def _check_settings(settings: Rules) -> None:
    if not isinstance(settings, Mapping):
        raise TypeError(f"settings: expected a dict of rules and adapter configs, got {settings!r}")
    for rule, config in settings.items():
        if not isinstance(config, AdapterConfig):
            raise TypeError(f"settings: expected an adapter config for {rule!r}, such as LoRA(8, 16.0), got {config!r}")


def bind(params: PyTree, trainable: PyTree, settings: Rules, *, key: jax.Array | None = None) -> PyTree:
    """Replaces weights by adapted weights: the parameters for a model of :mod:`subspace_jax.nn`.

    :func:`subspace_jax.nn.linear` multiplies by the adapted weights without forming their update.  The call itself is
    free, under ``jax.jit`` or not; differentiate through it with respect to ``trainable``.  The frozen weights get no
    gradient.

    Given trees of logical axes instead of arrays (those of :func:`logical_axes`), the result is the tree of axes of
    the bound parameters.

    Args:
      params: The frozen tree.
      trainable: Tree of :func:`init` or :func:`prepare`.
      settings: The same rules.
      key: Random key of this step, for configs with dropout; without one nothing is dropped.  A weight that is
        applied twice drops the same features of inputs of one shape.

    Returns:
      ``params`` with structured weights.

    Raises:
      ValueError: An adapter has no weight or no rule, or lacks an array.
      TypeError: The key is not of ``jax.random.key``.
    """
    if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"key: expected one of jax.random.key, got {key.dtype}")

    def put(path, config, base, arrays):
        return config.bind(base, arrays, _key_at(key, path) if key is not None and config.dropout else None)

    return _replace(params, trainable, settings, put)


def materialize(params: PyTree, trainable: PyTree, settings: Rules) -> PyTree:
    """Computes the effective weights: the parameters for any JAX model.

    Differentiable with respect to ``trainable``; weights keep their dtype, and are computed in float32 or better.

    Args:
      params: The frozen tree.
      trainable: Tree of :func:`init` or :func:`prepare`.
      settings: The same rules.

    Returns:
      ``params`` with plain arrays.

    Raises:
      ValueError: See :func:`bind`.
    """
    return _replace(params, trainable, settings, lambda path, config, base, own: as_dense(config.bind(base, own)))


def merge(params: PyTree, trainable: PyTree, settings: Rules, *, keep: bool = False) -> PyTree | tuple[PyTree, PyTree]:
    """Merges adapters into the weights, to serve without them.

    The values are those of :func:`materialize`, checked to be finite; hence not under ``jax.jit``.

    Args:
      params: The frozen tree.
      trainable: Tree of :func:`init` or :func:`prepare`.
      settings: The same rules.
      keep: Whether to return what :func:`unmerge` needs.

    Returns:
      The merged parameters; with ``keep`` also a dict, from the path to what :func:`unmerge` can't compute from them.

    Raises:
      ValueError: See :func:`bind`, or a merged weight is not finite.
    """
    merged = jax.jit(lambda params, trainable: materialize(params, trainable, settings))(params, trainable)
    at = bases_of(merged)
    for path in adapters_of(trainable):
        if not bool(jnp.all(jnp.isfinite(at[path]))):
            raise ValueError(f"{path}: the merged weight is not finite")
    if not keep:
        return merged

    @jax.jit
    def states(params, trainable):
        before, arrays = bases_of(params), adapters_of(trainable)
        return {path: c.merge_state(before[path], arrays[path]) for path, c in settings_of(trainable, settings).items()}

    return merged, {path: state for path, state in states(params, trainable).items() if state is not None}


def unmerge(merged: PyTree, trainable: PyTree, settings: Rules, kept: Mapping[str, Any]) -> PyTree:
    """Removes merged adapters from the weights, up to rounding.

    Args:
      merged: Parameters of :func:`merge`.
      trainable: The adapters that were merged.
      settings: The same rules.
      kept: The second result of :func:`merge` with ``keep``.

    Returns:
      The frozen tree.

    Raises:
      ValueError: See :func:`bind`, or ``kept`` lacks an entry.
    """

    def restored(path, config, weight, arrays):
        try:
            return config.unmerge(weight, arrays, kept.get(path))
        except (AttributeError, TypeError) as error:
            raise ValueError(f"kept: lacks what {path} needs; it comes from merge(..., keep=True)") from error

    return _replace(merged, trainable, settings, restored)


def logical_axes(axes: PyTree, trainable: PyTree, settings: Rules) -> tuple[PyTree, PyTree]:
    """Names the axes of frozen and of trained arrays by those of their weights.

    Args:
      axes: ``PartitionSpec`` of logical names for each parameter, such as :func:`subspace_jax.nn.param_axes`.
      trainable: Tree of :func:`init` or :func:`prepare`, of arrays or of shapes.
      settings: The same rules.

    Returns:
      Trees of ``PartitionSpec`` for the frozen and for the trainable tree.
    """
    names = {}

    def put(path, config, spec, arrays):
        base, own = config.axes(axes_of(spec))
        own = {**own, **(probe_axes(axes_of(spec)) if PROBES[0] in arrays else {})}
        if own.keys() != arrays.keys():
            raise ValueError(f"{path}: expected arrays {sorted(own)}, got {sorted(arrays)}")
        insert(names, path, {name: own[name] for name in arrays})
        return spec if is_structured(spec) else base

    return _replace(axes, trainable, settings, put), names


def roles(trainable: PyTree, settings: Rules) -> dict[str, str]:
    """Returns the roles of trained arrays, for :meth:`subspace_jax.train.Task.roles`.

    Args:
      trainable: Tree of :func:`init` or :func:`prepare`, of arrays or of shapes.
      settings: The same rules.

    Returns:
      Path of an array to "no_decay" (magnitudes of DoRA, cores of FLoRA, changes of singular values) or "probe" (of
      :func:`add_gradient_probes`); other arrays have no role.
    """
    found, chosen = adapters_of(trainable), settings_of(trainable, settings)
    return {
        f"{path}/{name}": config.roles[name]
        for path, config in chosen.items()
        for name in found[path]
        if name in config.roles
    }


def bases_of(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by path; a structured weight is one leaf."""
    return {path_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_structured)}


def settings_of(trainable: PyTree, settings: Rules) -> dict[str, AdapterConfig]:
    """Returns the config of each adapter by path; raises ValueError where tree and rules do not belong together."""
    found = adapters_of(trainable)
    try:
        # A rule for weights may match the text of a bias's path, which another rule trains.
        chosen = match_rules(
            settings, found, lambda path, config: found[path].keys() <= config.labels.keys(), name="settings"
        )
    except ValueError as error:
        raise ValueError(f"trainable: not the adapters of these settings: {error}") from error
    if strays := sorted(found.keys() - chosen.keys()):
        raise ValueError(f"trainable: adapters that no rule of the settings matches: {strays}")
    return chosen


def replace_at(params: PyTree, new: Mapping[str, Any]) -> PyTree:
    """Replaces leaves by others, or by subtrees, at some paths."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_structured)
    return jax.tree_util.tree_unflatten(treedef, [new.get(path_of(path), leaf) for path, leaf in leaves])


def _replace(
    params: PyTree, trainable: PyTree, settings: Rules, make: Callable[[str, AdapterConfig, Any, dict], Any]
) -> PyTree:
    """Replaces each adapted weight by ``make(path, config, weight, arrays)``."""
    found, chosen = adapters_of(trainable), settings_of(trainable, settings)
    at, made = bases_of(params), {}
    if lost := sorted(found.keys() - at.keys()):
        raise ValueError(f"params: have no weights for the adapters {lost}")
    for path, arrays in found.items():
        try:
            made[path] = make(path, chosen[path], _frozen(at[path]), arrays)
        except KeyError as error:
            raise ValueError(f"trainable: {path} lacks {error} for {chosen[path]}") from error
    return replace_at(params, made)


def _frozen(base):
    # Within a scan over layers stop_gradient would make each weight a new array, which the backward pass keeps.
    return jax.tree.map(lambda x: x if isinstance(x, P) else jax.lax.stop_gradient(x), base)


def _key_at(key: jax.Array, path: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
