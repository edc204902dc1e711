"""Deep subspace clustering (arXiv 2504.18179) of a small set: three phases, labels from the host, self-stopping."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from subspace_jax import train

SIDE, PER_CLUSTER, CLUSTERS, KEEP = 8, 32, 3, 9
CHANNELS, KERNELS = (1, 4), (3,)


def encode(params, x):
    """The input and the output of every layer, ``[n, p_l]`` each; ``x [n, h, w, c]``."""
    layers = [x]
    for layer in params:
        conv = jax.lax.conv_general_dilated(
            layers[-1], layer["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        layers.append(jax.nn.relu(conv + layer["bias"].reshape(1, 1, 1, -1)))
    return layers, [layer.reshape(len(x), -1) for layer in layers]


def decode(params, h):
    for layer in params:
        kernel, side = layer["kernel"], h.shape[1]
        full = jax.lax.conv_transpose(h, kernel, (2, 2), "VALID", transpose_kernel=True)
        start = (kernel.shape[0] - 2) // 2
        cropped = jax.lax.slice_in_dim(full, start, start + 2 * side, axis=1)
        cropped = jax.lax.slice_in_dim(cropped, start, start + 2 * side, axis=2)
        h = jax.nn.relu(cropped + layer["bias"].reshape(1, 1, 1, -1))
    return h


def autoencoder_init(key):
    glorot = jax.nn.initializers.glorot_uniform()
    shapes = [(k, k, i, o) for k, i, o in zip(KERNELS, CHANNELS[:-1], CHANNELS[1:], strict=True)]
    keys = jax.random.split(key, 2 * len(shapes))
    # A kernel of the decoder is stored like the encoder's that it mirrors, and is transposed where it is used.
    return {
        "encoder": [
            {"kernel": glorot(k, s, jnp.float32), "bias": jnp.zeros(s[3], jnp.float32)}
            for k, s in zip(keys[: len(shapes)], shapes, strict=True)
        ],
        "decoder": [
            {"kernel": glorot(k, s, jnp.float32), "bias": jnp.zeros(s[2], jnp.float32)}
            for k, s in zip(keys[len(shapes) :], shapes[::-1], strict=True)
        ],
    }


class Autoencoder(train.Task):
    """Phase 1: the sum of the squared errors of reconstruction."""

    splittable = False

    def init(self, key):
        return autoencoder_init(key), {}

    def loss(self, params, variables, batch, *, key, step):
        x = batch["inputs"]
        outputs, _ = encode(params["encoder"], x)
        return jnp.sum(jnp.square(decode(params["decoder"], outputs[-1]) - x)), (variables, {})

    def evaluators(self):
        return {}


class SelfExpression(train.Task):
    """Phase 2: every layer is expressed by itself, ``V = C V``, with one ``C [n, n]``, sharded by rows."""

    splittable = False
    ungathered = ("coef",)

    def __init__(self, n, labels=None):
        self._n, self._labels = n, labels

    def init(self, key):
        return {"autoencoder": autoencoder_init(key), "coef": self._coef(jnp.float32)}, {}

    def axes(self):
        params, variables = super().axes()
        return {**params, "coef": P("batch", None)}, variables

    def _coef(self, dtype):
        return jnp.full((self._n, self._n), 1e-8, dtype)

    def enter(self, state, at):
        return {"autoencoder": state.params, "coef": self._coef(jnp.float32)}, {}, None

    def loss(self, params, variables, batch, *, key, step):
        _, layers = encode(params["autoencoder"]["encoder"], batch["inputs"])
        return sum(jnp.sum(jnp.square(v - params["coef"] @ v)) for v in layers), (variables, {})

    def evaluators(self):
        return {"clusters": Clusters(self._labels)}


class Structured(SelfExpression):
    """Phase 3: an l1/2 quasi-norm of the entries of ``C`` between clusters; labels come from the host."""

    def init(self, key):
        params, _ = super().init(key)
        return params, {"labels": jnp.zeros(self._n, jnp.int32), "repeats": jnp.zeros((), jnp.int32)}

    def enter(self, state, at):
        variables = {"labels": jnp.full(self._n, -1, jnp.int32), "repeats": jnp.zeros((), jnp.int32)}
        # The moments of C go on, those of the encoder rest.
        adam, *rest = state.opt_state
        own = adam._replace(mu=adam.mu["coef"], nu=adam.nu["coef"])
        return state.params, variables, {"coef": (own, *rest)}

    def refresh(self, state, at):
        seed = jax.random.key_data(at.key)
        labels = at.host(functools.partial(spectral_labels, clusters=CLUSTERS, keep=KEEP), state.params["coef"], seed)
        old = state.variables
        repeats = jnp.where(jnp.all(labels == old["labels"]), old["repeats"] + 1, 0)
        return dataclasses.replace(state, variables={"labels": jnp.asarray(labels), "repeats": repeats})

    def loss(self, params, variables, batch, *, key, step):
        size = jnp.abs(params["coef"]) + jnp.abs(params["coef"]).T
        between = variables["labels"][:, None] != variables["labels"][None]
        roots = jnp.sqrt(jnp.where(size > 0, size, 1.0) + 1e-12)
        loss = 10 * jnp.sum(jnp.where(between & (size > 0), roots, 0.0))
        return loss, (variables, {"repeats": variables["repeats"]})


class Clusters(train.Evaluator):
    """The share of examples in their cluster, at the end of a phase."""

    sets, last, metrics = (), True, ("accuracy",)

    def __init__(self, labels):
        self._labels = labels

    def collect(self, model, batch, *, key):
        return model[0]["coef"]

    def finish(self, result):
        found = spectral_labels(result, np.zeros(2, np.uint32), clusters=CLUSTERS, keep=KEEP)
        return {"accuracy": clustering_accuracy(self._labels, found), "labels": found}


def affinity(coef, keep):
    """The ``keep`` largest entries in each column of the symmetrized sizes, symmetrized again."""
    sizes = (np.abs(coef) + np.abs(coef.T)) / 2
    kept = np.where(sizes >= np.sort(sizes, axis=0)[-keep], sizes, 0)
    return (kept + kept.T) / 2


def spectral_labels(coef, seed, *, clusters, keep):
    a = affinity(np.asarray(coef, np.float64), keep)
    scale = 1 / np.sqrt(a.sum(axis=1) + np.finfo(np.float64).eps)
    u, _, _ = np.linalg.svd(np.eye(len(a)) + scale[:, None] * a * scale)
    rows = u[:, :clusters] / np.maximum(np.linalg.norm(u[:, :clusters], axis=1, keepdims=True), 1e-12)
    found = KMeans(clusters, n_init=5, max_iter=1000, random_state=int(seed[-1]) % 2**31).fit_predict(rows)
    # By first appearance, so that equal partitions have equal labels.
    return np.argsort(np.unique(found, return_index=True)[1]).argsort()[found].astype(np.int32)


def clustering_accuracy(labels, found):
    table = np.zeros((CLUSTERS, CLUSTERS))
    np.add.at(table, (labels, found), 1)
    return float(table[linear_sum_assignment(-table)].sum() / len(labels))


def relative_stop(tol, patience):
    """Whether the loss has changed by less than ``tol`` of itself in each of the last ``patience`` rounds."""

    def stop(rows):
        losses = np.array([row["loss"] for row in rows if row["split"] == "train"][-patience - 1 :])
        return len(losses) > patience and bool(np.all(np.abs(np.diff(losses)) < tol * losses[:-1]))

    return stop


def stop_structured(rows):
    return [row for row in rows if row["split"] == "train"][-1]["repeats"] >= 5


class Repeated:
    """A data iterator that gives the same batch, in order, for ever."""

    def __init__(self, batch):
        self._batch, self._index = batch, 0

    def __iter__(self):
        return self

    def __next__(self):
        self._index += 1
        return self._batch

    def get_state(self):
        return {"next_index": self._index}

    def set_state(self, state):
        self._index = state["next_index"]


def union_of_subspaces(seed=0):
    """Points near three orthogonal subspaces of dimension 3 in 64 dimensions, in one order.

    Without any noise the loss falls for ever, and nothing ends the second phase but its cap.
    """
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((SIDE**2, 3 * CLUSTERS)))
    points = [rng.standard_normal((PER_CLUSTER, 3)) @ q[:, 3 * c : 3 * c + 3].T for c in range(CLUSTERS)]
    x, labels = np.concatenate(points), np.repeat(np.arange(CLUSTERS), PER_CLUSTER)
    order = rng.permutation(len(x))
    x = x[order] / np.linalg.norm(x[order], axis=1, keepdims=True)
    x = x + 0.008 * rng.standard_normal(x.shape)
    return x.astype(np.float32).reshape(-1, SIDE, SIDE, 1), labels[order]


def build(steps=(30, 150, 20)):
    """Returns the run; ``steps`` are the caps of the phases."""
    x, labels = union_of_subspaces()
    batch = {"inputs": x}
    data = train.DataSpec(train.batch_shapes(batch, len(x)), lambda seed: Repeated(batch), {}, 1)
    expression, structured = SelfExpression(len(x), labels), Structured(len(x), labels)
    adam = optax.adam(1e-3)
    return train.Run(
        (
            train.Phase("autoencoder", Autoencoder(), data, steps[0], adam, round_steps=1, stop=relative_stop(1e-4, 5)),
            train.Phase(
                "expression", expression, data, steps[1], adam, expression.enter, 1, stop=relative_stop(1e-2, 5)
            ),
            train.Phase(
                "structured", structured, data, steps[2], {"coef": adam}, structured.enter, 1, structured.refresh,
                stop_structured,
            ),
        ),
        lambda rows: {"accuracy": rows[-1]["accuracy"], "steps": rows[-1]["step"]},
        best="",
    )  # fmt: skip
