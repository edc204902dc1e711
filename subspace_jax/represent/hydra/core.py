"""Contrastive pairs of any two classes in gated subspaces (Hydra or SimLAP, arXiv 2410.18200): gate, pairs, loss.

Formulas are those of the authors' code, ``erow/FastSSL`` and ``erow/vitookit``.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from subspace_jax import linalg, losses, nn

PyTree = Any

PARTNERS = ("arbitrary", "identical", "distinct")
REDUCTIONS = ("anchor", "global")
# Added to the number of positives of an anchor, as in the authors' code.
_EPS = 1e-6
_MASKED = -1e30  # adds nothing to a logarithm of a sum, and is finite so that gradients are


class PairLabels(NamedTuple):
    """Classes of anchors, of their partners, and of the keys.

    Attributes:
      first: Class of each anchor, ``[batch]`` integers.
      second: Class with which it is paired, ``[batch]`` integers.
      keys: Class of each key, ``[keys]`` integers.
    """

    first: jax.Array
    second: jax.Array
    keys: jax.Array


class HydraLoss(NamedTuple):
    """What :func:`hydra_loss` computes.

    Attributes:
      renormalize: See :func:`gated_logits`.
      reduction: "anchor" or "global", see :func:`subspace_jax.losses.multi_positive_infonce`.
      penalty: Factor of :func:`gate_penalty`.
      block_size: Keys whose logits exist at a time.
    """

    renormalize: bool = False
    reduction: str = "anchor"
    penalty: float = 0.0
    block_size: int = 4096


DEFAULT_LOSS = HydraLoss()


def pair_gate(
    params: PyTree,
    statistics: PyTree,
    first: jax.Array,
    second: jax.Array | None = None,
    *,
    fuse: bool = True,
    train: bool = False,
) -> tuple[jax.Array, PyTree]:
    """The feature filter: for each pair of classes, how much of each dimension of the projections counts.

    With layers ``f = sigmoid(dense2(norm2(relu(dense1(norm1(relu(.)))))))`` and rows t of the table, the gate of
    classes a and b is ``f((t_a + t_b) / 2)``, or ``f(t_a) * f(t_b)`` where it is not fused.  Both are symmetric.

    Args:
      params: ``table [classes, e]``, ``norm1/{scale, bias} [e]``, ``dense1/{kernel [e, h], bias [h]}``,
        ``norm2/{scale, bias} [h]``, ``dense2/{kernel [h, d], bias [d]}``.
      statistics: ``norm1/{mean, var} [e]`` and ``norm2/{mean, var} [h]``, running statistics.
      first: Class of each anchor, ``[batch]`` integers.
      second: Class of its partner, ``[batch]``; None for the gate of single classes.
      fuse: Whether the rows of the table are averaged before the layers.
      train: Whether to normalize by the batch and to update the running statistics; where the gate is not fused, first
        by the classes of the anchors, then by those of the partners.

    Returns:
      Gate ``[batch, d]`` in (0, 1), and the running statistics.

    Raises:
      ValueError: A label is out of range, where its value is known; under ``jit`` the gate of its pair is NaN, and in
        training that of all pairs.
    """
    table = params["table"]
    for name, labels in (("first", first), ("second", second)):
        if labels is not None:
            check_labels(name, labels, table.shape[0])

    def layers(code: jax.Array, statistics: PyTree) -> tuple[jax.Array, PyTree]:
        x, new = code, {}
        for norm, dense in (("norm1", "dense1"), ("norm2", "dense2")):
            x, (mean, var) = nn.batch_norm(jax.nn.relu(x), **params[norm], **statistics[norm], train=train)
            x, new[norm] = nn.linear(x, **params[dense]), {"mean": mean, "var": var}
        return jax.nn.sigmoid(x), new

    codes = [nn.embed(labels, table) for labels in (first, second) if labels is not None]
    if fuse:
        return layers(sum(codes) / len(codes), statistics)
    gate = 1.0
    for code in codes:
        part, statistics = layers(code, statistics)
        gate = gate * part
    return gate, statistics


def class_pair_gates(gate: Callable[[jax.Array, jax.Array], jax.Array], num_classes: int) -> jax.Array:
    """Gates of all pairs of classes, computed for one first class at a time.

    Args:
      gate: Maps classes of anchors and partners, ``[batch]`` integers each, to gates ``[batch, d]``, such as a
        :class:`subspace_jax.represent.hydra.PairGate` in evaluation mode.
      num_classes: Number of classes.

    Returns:
      ``[classes, classes, d]``.
    """
    classes = jnp.arange(num_classes, dtype=jnp.int32)
    return jax.lax.map(lambda first: gate(jnp.full_like(classes, first), classes), classes)


def gate_penalty(gate: jax.Array) -> jax.Array:
    """Mean of ``gate (1 - gate)``: 0 where all gates are open or closed, 1/4 where all are half open.

    A design choice: the penalty that the paper is said to have is in neither of the authors' programs.
    """
    return jnp.mean(gate * (1 - gate))


def effective_rank(features: jax.Array) -> jax.Array:
    """Exponential of the entropy of the normalized squared singular values of centered features.

    Args:
      features: ``[examples, n]``, floating point.

    Returns:
      A scalar in [1, n], float32 or wider; 1 where all features are equal.

    Raises:
      ValueError: ``features`` has another number of axes.
    """
    if features.ndim != 2:
        raise ValueError(f"features: expected [examples, n], got shape {features.shape}")
    features = features.astype(linalg.working_dtype(features))
    features = features / linalg.binary_scale(features)
    centered = features - jnp.mean(features, axis=0, keepdims=True)
    variances = jnp.maximum(jnp.linalg.eigvalsh(linalg.gram(centered, centered)), 0)
    total = jnp.sum(variances)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(variances / jnp.where(total > 0, total, 1))))


def sample_partners(key: jax.Array, labels: jax.Array, kind: str, num_classes: int) -> jax.Array:
    """Draws a class to pair each anchor with.

    Args:
      key: Random key.
      labels: Class of each anchor, ``[batch]`` integers.
      kind: "arbitrary" permutes the classes of the batch, so that each partner's class is there; "identical" returns
        the labels; "distinct" draws one of the other classes, which the batch may lack.
      num_classes: Number of classes.

    Returns:
      ``[batch]`` integers.

    Raises:
      ValueError: ``kind`` is unknown, there are fewer than two classes for "distinct", or a label is out of range,
        where its value is known.
    """
    check_partners(kind, num_classes)
    check_labels("labels", labels, num_classes)
    if kind == "identical":
        return labels
    if kind == "arbitrary":
        return jax.random.permutation(key, labels)
    return (labels + jax.random.randint(key, labels.shape, 1, num_classes, labels.dtype)) % num_classes


def sample_near_partners(key: jax.Array, labels: jax.Array, distances: jax.Array, power: float = 1.0) -> jax.Array:
    """Draws a class to pair each anchor with, near ones more often, as in the authors' variant on MoCo v3.

    Args:
      key: Random key.
      labels: Class of each anchor, ``[batch]`` integers.
      distances: ``[classes, classes]``, at least 0, such as path lengths in a hierarchy of classes.
      power: Class c is drawn with a weight ``(1 + distances[label, c]) ** -power``.

    Returns:
      ``[batch]`` integers.

    Raises:
      ValueError: ``distances`` is not square.
    """
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"distances: expected [classes, classes], got shape {distances.shape}")
    check_labels("labels", labels, distances.shape[0])
    weights = -power * jnp.log1p(distances)
    return jax.random.categorical(key, nn.embed(labels, weights)).astype(labels.dtype)


def pair_masks(first: jax.Array, second: jax.Array, key_labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which keys are positives, of the partner's class, and which negatives, of neither class.

    Args:
      first: Class of each anchor, ``[batch]`` integers.
      second: Class of its partner, ``[batch]``.
      key_labels: Class of each key, ``[keys]``.

    Returns:
      Two boolean masks ``[batch, keys]``.
    """
    positives = key_labels[None] == second[:, None]
    return positives, ~positives & (key_labels[None] != first[:, None])


def gated_logits(
    z: jax.Array,
    k: jax.Array,
    gate: jax.Array,
    log_scale: ArrayLike,
    alpha: ArrayLike = 0.0,
    renormalize: bool = False,
) -> jax.Array:
    """Similarities of anchors and keys in the subspaces that gates select.

    With unit vectors z and k they are ``exp(log_scale) * (sum_d z_d gate_d^2 k_d - alpha * z.k)``.  The gate acts on
    both sides, and the product is not normalized again, so that a closed gate shrinks the logits.

    Args:
      z: Anchors ``[batch, d]``, floating point, of any length.
      k: Keys ``[keys, d]``, likewise.
      gate: ``[batch, d]``.
      log_scale: Logarithm of the inverse temperature.
      alpha: Repulsion of all keys in the full space, at least 0.
      renormalize: Takes the cosine of ``gate * z`` and ``gate * k`` instead, 0 where one of them is 0.  No ``[batch,
        keys, d]`` array is made.

    Returns:
      ``[batch, keys]``, float32 or wider.

    Raises:
      ValueError: Shapes do not match, or ``alpha`` is negative, where its value is known.
    """
    similarity, unit = _similarity(z, k, gate, log_scale, alpha, renormalize)
    return similarity(unit)


def hydra_loss(
    params: Mapping[str, ArrayLike],
    z: jax.Array,
    k: jax.Array,
    gate: jax.Array,
    labels: PairLabels,
    config: HydraLoss = DEFAULT_LOSS,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """InfoNCE of arbitrary pairs: keys of the partner's class against those of neither class.

    It is ``losses.multi_positive_infonce`` of :func:`gated_logits` and :func:`pair_masks`, but for the 1e-6 that the
    authors add to an anchor's number of positives, in blocks of keys: neither logits nor masks ``[batch, keys]`` exist.
    The gradient computes the logits of each block again.

    Args:
      params: ``log_scale []`` and, for repulsion in the full space, ``alpha []``; other entries are ignored.
      z: Anchors ``[batch, d]``, floating point.
      k: Keys ``[keys, d]``.
      gate: ``[batch, d]``.
      labels: Classes of anchors, partners and keys.
      config: What is computed.

    Returns:
      The loss, float32 or wider, and scalars by name: ``partnered``, the share of anchors with a positive;
      ``activation`` of the gate, the mean over anchors of its sum; ``entropy``, its mean Bernoulli entropy in nats;
      ``scale``, the inverse temperature.

    Raises:
      ValueError: Shapes do not match, the reduction is unknown, or ``alpha`` or ``penalty`` is negative.
    """
    first, second, key_labels = labels
    if (first.shape, second.shape, key_labels.shape) != (z.shape[:1], z.shape[:1], k.shape[:1]):
        raise ValueError(
            f"labels: expected [batch], [batch] and [keys] for z {z.shape} and k {k.shape}, got {first.shape}, "
            f"{second.shape} and {key_labels.shape}"
        )
    if config.reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {config.reduction!r}")
    if config.penalty < 0:
        raise ValueError(f"penalty: expected at least 0, got {config.penalty}")
    similarity, unit = _similarity(z, k, gate, params["log_scale"], params.get("alpha", 0.0), config.renormalize)
    keys, gate = {"unit": unit, "labels": key_labels}, gate.astype(unit.dtype)

    def block_of(block: PyTree, mask: jax.Array) -> tuple[jax.Array, ...]:
        masks = pair_masks(first, second, block["labels"])
        return similarity(block["unit"]), *(each & mask[None] for each in masks)

    def add_negatives(carry: PyTree, block: PyTree, mask: jax.Array) -> PyTree:
        against, count = carry
        logits, positives, negatives = block_of(block, mask)
        total = jax.nn.logsumexp(jnp.where(negatives, logits, _MASKED), axis=1)
        return jnp.logaddexp(against, total), count + jnp.sum(positives, axis=1, dtype=count.dtype)

    zeros = jnp.zeros(z.shape[0], unit.dtype)
    start = (jnp.full_like(zeros, _MASKED), zeros)
    against, count = losses.scan_keys(add_negatives, start, keys, config.block_size)

    def add_positives(each: jax.Array, block: PyTree, mask: jax.Array) -> jax.Array:
        logits, positives, _ = block_of(block, mask)
        return each + jnp.sum(jax.nn.softplus(against[:, None] - logits), axis=1, where=positives)

    each = losses.scan_keys(add_positives, zeros, keys, config.block_size)
    if config.reduction == "anchor":
        loss = jnp.mean(each / (count + _EPS))
    else:
        loss = jnp.sum(each) / jnp.maximum(jnp.sum(count), 1)
    if config.penalty:
        loss += config.penalty * gate_penalty(gate)
    entropy = jax.scipy.special.entr(gate) + jax.scipy.special.entr(1 - gate)
    return loss, {
        "partnered": jnp.mean((count > 0).astype(loss.dtype)),
        "activation": jnp.mean(jnp.sum(gate, axis=1)),
        "entropy": jnp.mean(entropy),
        "scale": jnp.exp(jnp.asarray(params["log_scale"], loss.dtype)),
    }


def _similarity(
    z: jax.Array, k: jax.Array, gate: jax.Array, log_scale: ArrayLike, alpha: ArrayLike, renormalize: bool
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """Returns the logits of anchors as a function of unit keys ``[n, d]``, and all keys as unit vectors."""
    if z.ndim != 2 or k.ndim != 2 or z.shape[1] != k.shape[1]:
        raise ValueError(f"z, k: expected [batch, d] and [keys, d], got {z.shape} and {k.shape}")
    if gate.shape != z.shape:
        raise ValueError(f"gate: expected the shape {z.shape} of z, got {gate.shape}")
    if not isinstance(alpha, jax.core.Tracer) and not np.all(np.asarray(alpha) >= 0):
        raise ValueError(f"alpha: expected at least 0, got {alpha}")
    dtype = jnp.promote_types(linalg.working_dtype(z), linalg.working_dtype(k))
    z, k = (linalg.unit_vectors(x.astype(dtype)) for x in (z, k))
    scale, alpha = jnp.exp(jnp.asarray(log_scale, dtype)), jnp.asarray(alpha, dtype)
    gate = gate.astype(dtype)
    if not renormalize:
        anchors = scale * z * (jnp.square(gate) - alpha)
        return lambda unit: anchors @ unit.T, k
    gate = gate / linalg.binary_scale(gate, -1)  # the cosine does not depend on its size
    open_part = jnp.square(gate)
    anchors = linalg.unit_vectors(gate * z) * gate

    def cosines(unit: jax.Array) -> jax.Array:
        square = open_part @ jnp.square(unit).T
        lengths = jnp.sqrt(jnp.where(square > 0, square, 1))
        inside = jnp.where(square > 0, (anchors @ unit.T) / lengths, 0)
        return scale * (inside - alpha * (z @ unit.T))

    return cosines, k


def check_labels(name: str, labels: ArrayLike, num_classes: int) -> None:
    """Raises a ValueError for labels that are no integers from 0 to ``num_classes - 1``; skips traced values."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"{name}: expected integers, got {labels.dtype}")
    if isinstance(labels, jax.core.Tracer) or not getattr(labels, "is_fully_addressable", True):
        return
    values = np.asarray(labels)
    if wrong := values[(values < 0) | (values >= num_classes)].tolist():
        raise ValueError(f"{name}: expected integers in 0 to {num_classes - 1}, got {wrong[0]}")


def check_partners(kind: str, num_classes: int) -> None:
    """Raises a ValueError for an unknown kind of partners, or where there are too few classes for it."""
    if kind not in PARTNERS:
        raise ValueError(f"partners: expected one of {PARTNERS}, got {kind!r}")
    if kind == "distinct" and num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2 for distinct partners, got {num_classes}")
