"""What an autoencoder does to its language model, and where in the texts its features act."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import losses, nn
from subspace_jax.interpret.polysae.activations import ResidualStream, usual
from subspace_jax.interpret.polysae.decoder import Params, interaction_strength
from subspace_jax.interpret.polysae.evaluate import encode
from subspace_jax.interpret.polysae.settings import PolySAEConfig

PyTree = Any
Batch = Mapping[str, np.ndarray]
_KINDS = ("clean", "spliced", "zero", "mean")


@functools.partial(
    jax.tree_util.register_dataclass, meta_fields=["config"], data_fields=["params", "threshold", "scale", "center"]
)
@dataclass(frozen=True)
class Trained:
    """A trained autoencoder.

    Attributes:
      config: The autoencoder.
      params: Its parameters.
      threshold: That of :class:`SAEState`, a scalar.
      scale: Factor of the activations that it was trained on, a scalar.
      center: What was subtracted from them then, ``[d]``.
    """

    config: PolySAEConfig
    params: Params
    threshold: jax.Array
    scale: jax.Array
    center: jax.Array

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns dense codes ``[B, m]`` and reconstructions of activations ``[B, d]`` as they are."""
        return encode(self.config, self.params, x, self.threshold, self.scale, self.center)

    def usual(self, x: jax.Array) -> jax.Array:
        """Returns which activations ``[B, d]`` of a language model count, see :func:`usual`."""
        return usual(x * self.scale - self.center[None])


class LossRecovered(NamedTuple):
    """Cross-entropy of the language model with another stream at the positions that count, in nats a token.

    Attributes:
      clean: With its own stream.
      spliced: With the reconstructions.
      zero: With zeros.
      mean: With the mean activation.
      recovered: ``(zero - spliced) / (zero - clean)``.
      recovered_from_mean: The same of the mean ablation.
    """

    clean: float
    spliced: float
    zero: float
    mean: float
    recovered: float
    recovered_from_mean: float


class Occurrences(NamedTuple):
    """Where features are active, as a list in the order of positions.

    Attributes:
      rows: Row of the texts, ``[n]``.
      columns: Position in the row, ``[n]``.
      features: The feature, ``[n]``.
      values: Its value, ``[n]``.
      positions: Number of positions that count.
      mean: Mean activation of these, ``[d]``.
    """

    rows: np.ndarray
    columns: np.ndarray
    features: np.ndarray
    values: np.ndarray
    positions: int
    mean: np.ndarray


def find_occurrences(
    trained: Trained, read: Callable[[PyTree, Batch], tuple], params: PyTree, batches: Iterable[Batch]
) -> Occurrences:
    """Encodes a set, and lists what is active where.

    Args:
      trained: The autoencoder.
      read: ``read(params, batch)`` returns activations ``[rows * positions, d]`` and which of them count, such as a
        :class:`ResidualStream`.
      params: Parameters of the layers that it runs.
      batches: Batches with ``mask``.
    """

    @jax.jit
    def codes(params, trained, batch):
        x, weights = read(params, batch)
        if isinstance(read, ResidualStream):
            weights = jnp.where(trained.usual(x), weights, 0)
        return trained.encode(x)[0] * weights[:, None], jnp.sum(x * weights[:, None], axis=0), jnp.sum(weights)

    parts, total, count, first = [], 0.0, 0.0, 0
    for batch in batches:
        z, x, n = jax.device_get(codes(params, trained, dict(batch)))
        at, features = np.nonzero(z > 0)
        rows, columns = np.divmod(at, len(z) // len(batch["mask"]))
        parts.append((rows + first, columns, features, z[at, features]))
        first, total, count = first + len(batch["mask"]), total + x, count + n
    rows, columns, features, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Occurrences(rows, columns, features, values, int(count), np.asarray(total / max(count, 1), np.float32))


def loss_recovered(
    trained: Trained, stream: ResidualStream, params: PyTree, batches: Iterable[Batch], mean: np.ndarray
) -> LossRecovered:
    """Runs a language model with its stream replaced, four times over the same texts.

    Positions that do not count, outliers among them, keep their stream.

    Args:
      trained: The autoencoder.
      stream: Where its activations come from.
      params: Parameters of the whole model, stacked.
      batches: Rows of :func:`subspace_jax.data.text.pack_rows` with ``mask``.
      mean: The mean activation, ``[d]``.
    """

    @functools.partial(jax.jit, static_argnames="kind")
    def entropy(params, trained, mean, batch, kind):
        counted = stream.counted(batch)[..., None] > 0

        def change(x):
            flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
            new = {"zero": jnp.zeros_like, "mean": lambda flat: jnp.broadcast_to(mean[None], flat.shape)}
            changed = trained.encode(flat)[1] if kind == "spliced" else new[kind](flat)
            kept = counted & trained.usual(flat).reshape(counted.shape)
            return jnp.where(kept, changed.reshape(x.shape).astype(x.dtype), x)

        out = nn.causal_lm_apply(
            stream.whole,
            params,
            batch["inputs"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            logits_dtype=jnp.float32,
            options=nn.LayerOptions(edit=None if kind == "clean" else (stream.layer - 1, change)),
        )
        nll = losses.cross_entropy(out.logits.reshape(-1, out.logits.shape[-1]), batch["labels"].reshape(-1))
        weights = (batch["weights"] * batch["mask"][:, None]).reshape(-1)
        return jnp.sum(nll * weights), jnp.sum(weights)

    sums = np.zeros((len(_KINDS), 2))
    for batch in batches:
        for i, kind in enumerate(_KINDS):
            sums[i] += np.asarray(entropy(params, trained, mean, dict(batch), kind=kind))
    clean, spliced, zero, ablated = (float(x) for x in sums[:, 0] / np.maximum(sums[:, 1], 1))
    shares = ((other - spliced) / (other - clean) if other != clean else 0.0 for other in (zero, ablated))
    return LossRecovered(clean, spliced, zero, ablated, *shares)


def most_telling(found: Occurrences, features: int, wanted: int) -> np.ndarray:
    """Returns the numbers of features to look at, the most active first.

    At least three rows fire each of them, and at most a tenth of the positions.
    """
    counts = np.bincount(found.features, minlength=features)
    pairs = np.unique(np.stack([found.features, found.rows], axis=1), axis=0)
    rows = np.bincount(pairs[:, 0], minlength=features)
    mass = np.bincount(found.features, weights=found.values, minlength=features)
    mass[(rows < 3) | (counts > found.positions / 10)] = 0
    ranked = np.argsort(-mass, kind="stable")[:wanted]
    return ranked[mass[ranked] > 0]


def top_places(found: Occurrences, feature: int, wanted: int) -> list[tuple[int, int, float]]:
    """Returns row, position and value where a feature is most active, at most one place in each row."""
    own = np.flatnonzero(found.features == feature)
    own, places, seen = own[np.argsort(-found.values[own], kind="stable")], [], set()
    for i in own:
        row = int(found.rows[i])
        if row not in seen:
            places.append((row, int(found.columns[i]), float(found.values[i])))
            seen.add(row)
        if len(places) == wanted:
            break
    return places


def interactions(
    params: Params, found: Occurrences, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Returns pairs of chosen features, their strengths, how often both are active, and the correlation of the two.

    Args:
      params: Parameters of a polynomial decoder, of order 2 or more.
      found: Where features are active.
      chosen: Numbers of features, ``[n]``.
    """
    place = {int(feature): i for i, feature in enumerate(chosen)}
    there = np.isin(found.features, chosen)
    spots = np.unique(np.stack([found.rows[there], found.columns[there]], axis=1), axis=0, return_inverse=True)[1]
    active = np.zeros((int(spots.max(initial=-1)) + 1, len(chosen)), np.float32)
    active[spots.reshape(-1), [place[int(f)] for f in found.features[there]]] = 1
    first, second = np.triu_indices(len(chosen), 1)
    pairs = np.stack([chosen[first], chosen[second]], axis=1)
    strength = np.asarray(interaction_strength(params, jnp.asarray(pairs)))
    counts = (active.T @ active)[first, second]
    varies = len(pairs) > 1 and np.std(strength) > 0 and np.std(counts) > 0
    return pairs, strength, counts, float(np.corrcoef(strength, counts)[0, 1]) if varies else 0.0
