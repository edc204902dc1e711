"""Adapters of a whole tree of parameters: drawing them, putting them in, baking them in, taking them out."""

import re
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from subspace_jax.adapters.convolution import ConvDoRAWeight, ConvLoRAWeight
from subspace_jax.adapters.dora import DoRAWeight
from subspace_jax.adapters.effort import EffortBase, EffortWeight
from subspace_jax.adapters.flora import FLoRA, FLoRAWeight
from subspace_jax.adapters.full import Full
from subspace_jax.adapters.gradient_probes import PROBES, probe_axes
from subspace_jax.adapters.lora import LoRAWeight
from subspace_jax.adapters.quantized import Int8Weight
from subspace_jax.adapters.rules import adapters_of, insert, match_rules, path_of
from subspace_jax.adapters.svfit import SpectralBase, SVFitWeight

PyTree = Any

WEIGHTS = (LoRAWeight, DoRAWeight, ConvLoRAWeight, ConvDoRAWeight, FLoRAWeight, SVFitWeight, EffortWeight)
# What stands in a weight's place in a prepared tree, and brings what taking a merged adapter out needs.
_BASES = (SpectralBase, EffortBase)
_NOT_WEIGHTS = ("scale", "bias")


class AdapterConfig(Protocol):
    """What a method has to offer; :class:`LoRA` is an example."""

    keeps_base: bool

    def start(self, key: jax.Array, w: jax.Array, table: bool) -> tuple[Any, dict[str, jax.Array]]:
        """Returns the frozen part of a weight, and the arrays to be trained."""

    def bind(self, base: Any, arrays: dict[str, jax.Array]) -> Any:
        """Returns the weight with its arrays in, structured; takes a ``key``, too, if the setting has dropout."""

    def axes(self, names: P) -> tuple[Any, dict[str, P]]:
        """Returns the logical axes of both parts."""

    def unmerge(self, merged: jax.Array, arrays: dict[str, jax.Array], kept: Any) -> jax.Array:
        """Returns the weight without what was merged into it."""


Rules = Mapping[str | re.Pattern, AdapterConfig]


def init(key: jax.Array, params: PyTree, settings: Rules) -> PyTree:
    """Draws adapters for the weights that rules name.

    Weights are floating-point leaves ``[..., in, out]``; leading axes are stacked weights, each with an adapter of its
    own, unless the setting says that they are a convolution's window (``window`` of LoRA and DoRA, the number of ranks
    of FLoRA).  Leaves called ``scale`` or ``bias`` and vectors are no weights, except for :class:`Full` and for
    :class:`FLoRA` of one rank.  Weights out of :func:`quantize` may be adapted, too.

    Args:
      key: Random key.  The values of an adapter depend on it, on the path and on the shape of its weight alone.
      params: Any tree of arrays: nested dicts, ``nnx.State``, Linen variables.
      settings: Rule to setting; see :func:`match_rules`.  Of several rules that match, the first one counts.

    Returns:
      The trainable tree, a nested dict: at the path of each weight a dict of its adapter's arrays, float32 (float64
      for float64 weights).

    Raises:
      ValueError: A rule matches nothing, or a setting changes the frozen weight and so needs :func:`prepare`.
      TypeError: A weight is not of floating point.
    """
    for setting in settings.values():
        if not setting.keeps_base:
            raise ValueError(f"settings: {setting} takes part of the weight away or factors it; call prepare instead")
    return prepare(key, params, settings)[1]


def prepare(
    key: jax.Array, params: PyTree, settings: Rules, *, gradients: PyTree | None = None
) -> tuple[PyTree, PyTree]:
    """Draws adapters, and makes what stays frozen beside them.

    For most settings that is the parameters themselves; for PiSSA and LoRA-GA the weight less the update that they
    begin with; for the spectral methods the weight with its singular vectors.  All later functions take the returned
    tree in place of ``params``.  Keep it, or its seed, in a checkpoint: singular vectors of equal singular values are
    not unique.

    Args:
      key: See :func:`init`.
      params: See :func:`init`.
      settings: See :func:`init`.
      gradients: Of the loss over some batches, with the structure of ``params``, for LoRA-GA.

    Returns:
      The frozen tree, and the trainable tree.

    Raises:
      ValueError: A rule matches nothing, or a setting doesn't fit its weight.
      TypeError: A weight is not of floating point, or is quantised and would have to be taken apart.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_quantized)
    at_gradient = {} if gradients is None else bases_of(gradients)
    paths = [path_of(path) for path, _ in leaves]
    chosen = _choose(settings, dict(zip(paths, (leaf for _, leaf in leaves), strict=True)))
    base, trainable = [], {}
    for path, (_, w) in zip(paths, leaves, strict=True):
        if path not in chosen:
            base.append(w)
            continue
        if not jnp.issubdtype(w.dtype, jnp.floating):
            raise TypeError(f"{path}: expected a floating-point weight, got {w.dtype}")
        setting = chosen[path]
        if _is_quantized(w) and (isinstance(setting, Full) or not setting.keeps_base):
            raise TypeError(f"{path}: {setting} takes the weight apart or trains it, which is quantised")
        more = {"gradient": at_gradient.get(path)} if getattr(setting, "init", "") == "lora_ga" else {}
        table = path.split("/")[-1] == "embedding"
        frozen, arrays = setting.start(_key_at(key, path), w, table, **more)
        base.append(frozen)
        insert(trainable, path, arrays)
    return jax.tree_util.tree_unflatten(treedef, base), trainable


def _choose(settings: Rules, leaves: dict[str, Any]) -> dict[str, AdapterConfig]:
    def admits(path, setting):
        if isinstance(setting, Full) or (isinstance(setting, FLoRA) and len(setting.ranks) == 1):
            return True
        return leaves[path].ndim >= 2 and path.split("/")[-1] not in _NOT_WEIGHTS

    return match_rules(settings, leaves, admits)


def bind(params: PyTree, trainable: PyTree, settings: Rules, *, key: jax.Array | None = None) -> PyTree:
    """Puts adapters into the places of their weights: what a model of :mod:`subspace_jax.nn` is called with.

    :func:`subspace_jax.nn.linear` multiplies with the structured weights, whose update is never formed.  Takes no time
    worth counting, under ``jax.jit`` or not; differentiate through it with respect to ``trainable``.  The frozen
    weights get no gradient.

    Given trees of logical axes instead of arrays (those of :func:`logical_axes`), the result is the tree of axes of
    the bound parameters.

    Args:
      params: The frozen tree.
      trainable: Of :func:`init` or :func:`prepare`.
      settings: The same rules.
      key: Random key of this step, for settings with dropout; without one nothing is dropped.  A weight that is
        applied twice drops the same entries of inputs of one shape.

    Returns:
      ``params`` with structured weights.

    Raises:
      ValueError: An adapter has no weight or no rule, or lacks an array.
      TypeError: The key is not of ``jax.random.key``.
    """
    if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"key: expected one of jax.random.key, got {key.dtype}")

    def put(setting, base, arrays, path):
        if key is None or not getattr(setting, "dropout", 0):
            return setting.bind(base, arrays)
        return setting.bind(base, arrays, _key_at(key, path))

    return _replace(params, trainable, settings, put, with_path=True)


def materialize(params: PyTree, trainable: PyTree, settings: Rules) -> PyTree:
    """Forms the effective weights: what any JAX model can be called with, at the price of their size.

    Differentiable with respect to ``trainable``; weights keep their dtype, and are formed in float32 or better.

    Args:
      params: The frozen tree.
      trainable: Of :func:`init` or :func:`prepare`.
      settings: The same rules.

    Returns:
      ``params`` with plain arrays.

    Raises:
      ValueError: As :func:`bind`.
    """
    return _replace(params, trainable, settings, lambda setting, base, arrays: _dense(setting.bind(base, arrays)))


def merge(params: PyTree, trainable: PyTree, settings: Rules, *, keep: bool = False) -> PyTree | tuple[PyTree, PyTree]:
    """Bakes adapters into the weights, for serving without them.

    The numbers are those of :func:`materialize`; this looks at them, hence not under ``jax.jit``.

    Args:
      params: The frozen tree.
      trainable: Of :func:`init` or :func:`prepare`.
      settings: The same rules.
      keep: Whether to return what :func:`unmerge` needs, too.

    Returns:
      The merged parameters; with ``keep`` also a dict, path to what cannot be found out from them.

    Raises:
      ValueError: As :func:`bind`, or a merged weight is not finite.
    """
    merged = jax.jit(lambda params, trainable: materialize(params, trainable, settings))(params, trainable)
    at = bases_of(merged)
    for path in adapters_of(trainable):
        if not bool(jnp.all(jnp.isfinite(at[path]))):
            raise ValueError(f"{path}: the merged weight is not finite")
    if not keep:
        return merged
    bound = bases_of(bind(params, trainable, settings))
    before = bases_of(params)
    kept = {}
    for path, setting in settings_of(trainable, settings).items():
        weight = bound[path]
        if isinstance(weight, DoRAWeight | ConvDoRAWeight):
            kept[path] = weight.gain
        elif isinstance(setting, Full):
            kept[path] = before[path]
        elif isinstance(before[path], _BASES):
            kept[path] = before[path].bases
    return merged, kept


def unmerge(merged: PyTree, trainable: PyTree, settings: Rules, kept: Mapping[str, Any]) -> PyTree:
    """Takes adapters out of merged weights again, up to rounding.

    Args:
      merged: Of :func:`merge`.
      trainable: The adapters that were merged.
      settings: The same rules.
      kept: Of :func:`merge` with ``keep``.

    Returns:
      The frozen tree.

    Raises:
      ValueError: As :func:`bind`, or ``kept`` lacks an entry.
    """

    def undo(setting, weight, arrays, path):
        try:
            return setting.unmerge(weight, arrays, kept.get(path))
        except (AttributeError, TypeError) as error:
            raise ValueError(f"kept: lacks what {path} needs; it comes from merge(..., keep=True)") from error

    return _replace(merged, trainable, settings, undo, with_path=True)


def logical_axes(axes: PyTree, trainable: PyTree, settings: Rules) -> tuple[PyTree, PyTree]:
    """Names the axes of frozen and of trained arrays by those of the weights that they belong to.

    Args:
      axes: ``PartitionSpec`` of logical names for each parameter, such as :func:`subspace_jax.nn.causal_lm_axes`.
      trainable: Of :func:`init` or :func:`prepare`, of arrays or of shapes.
      settings: The same rules.

    Returns:
      Trees of ``PartitionSpec`` for the frozen and for the trainable tree.
    """
    names = {}

    def put(setting, spec, arrays, path):
        base, own = setting.axes(spec.values if _is_quantized(spec) else spec)
        base = spec if _is_quantized(spec) else base
        own = {**own, **(probe_axes(spec) if PROBES[0] in arrays else {})}
        if own.keys() != arrays.keys():
            raise ValueError(f"{path}: expected arrays {sorted(own)}, got {sorted(arrays)}")
        insert(names, path, {name: own[name] for name in arrays})
        return base

    return _replace(axes, trainable, settings, put, with_path=True), names


def _key_at(key: jax.Array, path: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _is_quantized(x: Any) -> bool:
    return isinstance(x, Int8Weight)


def _is_base(x: Any) -> bool:
    return isinstance(x, (*_BASES, *WEIGHTS, Int8Weight))


def _dense(weight: Any) -> jax.Array:
    return weight.dense() if isinstance(weight, WEIGHTS) else weight


def bases_of(tree: PyTree) -> dict[str, Any]:
    """What stands at each path: an array, or a weight with what its method keeps beside it."""
    return {path_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_base)}


def settings_of(trainable: PyTree, settings: Rules) -> dict[str, AdapterConfig]:
    """Gives each adapter its setting; raises ValueError where the two don't belong together."""
    found = adapters_of(trainable)
    try:
        # A rule that may name a bias is not one that names weights, even where its text would match them.
        chosen = match_rules(settings, found, lambda path, s: isinstance(s, Full) == (found[path].keys() == {"full"}))
    except ValueError as error:
        raise ValueError(f"trainable: not the adapters of these settings: {error}") from error
    if strays := sorted(found.keys() - chosen.keys()):
        raise ValueError(f"trainable: adapters that no rule of the settings names: {strays}")
    return chosen


def _replace(params: PyTree, trainable: PyTree, settings: Rules, make, with_path: bool = False) -> PyTree:
    found, chosen = adapters_of(trainable), settings_of(trainable, settings)
    at, made = bases_of(params), {}
    if lost := sorted(found.keys() - at.keys()):
        raise ValueError(f"params: have no weights for the adapters {lost}")
    for path, arrays in found.items():
        try:
            made[path] = make(chosen[path], at[path], arrays, *([path] if with_path else []))
        except KeyError as error:
            raise ValueError(f"trainable: {path} lacks {error} for {chosen[path]}") from error
    return replace_at(params, made)


def replace_at(params: PyTree, new: Mapping[str, Any]) -> PyTree:
    """Puts other leaves, or subtrees, at some paths."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_base)
    return jax.tree_util.tree_unflatten(treedef, [new.get(path_of(path), leaf) for path, leaf in leaves])
