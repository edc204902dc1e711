"""A sparse autoencoder with a polynomial decoder (arXiv 2602.01322): a retraction after the update, sums over a set."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from subspace_jax import linalg, train


def poly_decode(params, z, order=3):
    a = z @ params["U"]
    out = a @ params["C1"].T + params["b_dec"][None]
    for power in range(2, order + 1):
        c = params[f"C{power}"]
        out = out + params[f"lambda{power}"] * (a[:, : c.shape[1]] ** power @ c.T)
    return out


def topk(pre, k):
    values, indices = jax.lax.top_k(pre, k)
    return jnp.zeros_like(pre).at[jnp.arange(len(pre))[:, None], indices].set(jax.nn.relu(values))


class PolySAETask(train.Task):
    """A top-k code and its polynomial decoder, whose factor ``U`` has orthonormal columns.

    Args:
      d: Length of the activations.
      m: Length of the codes.
      k: Entries of a code.
      ranks: Those of the decoder, falling.
      order: Degree of the decoder.
      warmup: Steps until the loss of dead features has its full coefficient of 1.
      dead_after: Steps without firing after which a feature is dead.
    """

    def __init__(self, d, m, k, ranks, order=3, warmup=0, dead_after=1000):
        self.d, self.m, self.k, self.ranks, self.order = d, m, k, ranks, order
        self.warmup, self.dead_after = warmup, dead_after

    def init(self, key):
        keys = jax.random.split(key, 5)
        rows = jax.random.normal(keys[0], (self.m, self.d))
        params = {
            "W_enc": 0.1 * (rows / jnp.linalg.norm(rows, axis=1, keepdims=True)).T,
            "b_enc": jnp.zeros(self.m),
            "b_dec": jnp.zeros(self.d),
            "U": linalg.random_orthonormal(keys[1], self.m, self.ranks[0]),
            "lambda2": jnp.asarray(-0.5),
            "lambda3": jnp.asarray(0.5),
        }
        for i, (r, own) in enumerate(zip(self.ranks, keys[2:], strict=True), start=1):
            params[f"C{i}"] = jax.random.uniform(own, (self.d, r), minval=-1, maxval=1) * math.sqrt(6 / r)
        variables = {"since_fired": jnp.zeros(self.m, jnp.int32), "fired": jnp.zeros(self.m, bool)}
        return params, variables

    def axes(self):
        params, variables = super().axes()
        named = {"W_enc": P("embed", "mlp"), "b_enc": P("mlp"), "C1": P("embed", None)}
        return {**params, **named}, {name: P("mlp") for name in variables}

    def codes(self, params, batch):
        pre = (batch["inputs"] - params["b_dec"][None]) @ params["W_enc"] + params["b_enc"][None]
        return pre, topk(pre, self.k)

    def loss(self, params, variables, batch, *, key, step):
        x = batch["inputs"]
        pre, z = self.codes(params, batch)
        error = x - poly_decode(params, z, self.order)
        mse = jnp.mean(jnp.sum(jnp.square(error), axis=-1))
        dead = variables["since_fired"] > self.dead_after
        coefficient = jnp.minimum((step + 1) / self.warmup, 1.0).astype(x.dtype) if self.warmup else 1.0
        aux = coefficient * self.dead_loss(params, pre, jax.lax.stop_gradient(error), dead)
        variables = {**variables, "fired": variables["fired"] | jnp.any(z > 0, axis=0)}
        return mse + aux, (variables, {"mse": mse, "aux": aux})

    def dead_loss(self, params, pre, error, dead):
        """What dead features can explain of the error."""
        most = min(self.d // 2, self.m)
        count = jnp.sum(dead)
        values, indices = jax.lax.top_k(jnp.where(dead[None], pre, -jnp.inf), most)
        kept = jnp.where(jnp.arange(most)[None] < count, values, 0.0)
        kept = jnp.where(jnp.isfinite(kept), kept, 0.0)
        code = jnp.zeros_like(pre).at[jnp.arange(len(pre))[:, None], indices].set(kept)
        squares = jnp.sum(jnp.square(poly_decode(params, code, self.order) - error), axis=-1)
        scale = jnp.minimum(count.astype(pre.dtype) / (self.d // 2), 1.0)
        return jnp.where(count > 0, scale * jnp.mean(squares), 0.0)

    def after_update(self, params, variables, *, key, step):
        """Retracts the factor, and counts the steps since each feature has fired."""
        since = jnp.where(variables["fired"], 0, variables["since_fired"] + 1)
        u = linalg.positive_qr(params["U"])[0]
        return {**params, "U": u}, {"since_fired": since, "fired": jnp.zeros_like(variables["fired"])}

    def evaluators(self):
        return {"variance": ExplainedVariance(self), "distance": Wasserstein(self)}


class DecoderTask(PolySAETask):
    """The decoder alone, of codes that are given."""

    def codes(self, params, batch):
        return batch["codes"], batch["codes"]


class ExplainedVariance(train.Evaluator):
    """The share of the set's variance that the reconstruction explains: a ratio of two sums over the set."""

    metrics = ("explained",)

    def __init__(self, task):
        self._task = task

    def collect(self, model, batch, *, key):
        params, _ = model
        x, real = batch["inputs"], batch["mask"][:, None] > 0
        error = x - poly_decode(params, self._task.codes(params, batch)[1], self._task.order)
        sums = {"x": x, "x2": x**2, "error2": error**2}
        return {n: jnp.sum(v, axis=0, where=real) for n, v in sums.items()} | {"count": jnp.sum(batch["mask"])}

    def finish(self, eval):
        total = np.sum(eval["x2"] - eval["x"] ** 2 / eval["count"])
        return {"explained": 1 - np.sum(eval["error2"]) / total}


class Wasserstein(train.Evaluator):
    """The distance between the codes of two classes, feature by feature, from all examples of the set."""

    reduce, metrics = "rows", ("distance",)

    def __init__(self, task):
        self._task = task

    def collect(self, model, batch, *, key):
        return {"codes": self._task.codes(model[0], batch)[1], "labels": batch["labels"]}

    def finish(self, eval):
        codes, labels = np.asarray(eval["codes"]), np.asarray(eval["labels"])
        grid = np.linspace(0, 1, 201)[1:-1]
        first, second = (np.quantile(codes[labels == c], grid, axis=0) for c in (0, 1))
        return {"distance": np.mean(np.abs(first - second)), "examples": len(codes)}


def interaction_strength(params, pairs):
    """``|lambda2| ||B[:, i, j]||`` of each pair of features."""
    u, c = np.asarray(params["U"])[:, : params["C2"].shape[1]], np.asarray(params["C2"])
    return np.array([abs(float(params["lambda2"])) * np.linalg.norm(c @ (u[i] * u[j])) for i, j in pairs])


M, D, PLANTED = 12, 16, ((0, 1), (2, 3), (4, 5))


def planted(seed=0, num=6000):
    """Activations ``sum z_i d_i`` and a part for each of three pairs of features that are active together."""
    rng = np.random.default_rng(seed)
    directions, both = (rng.standard_normal((n, D)) / np.sqrt(D) for n in (M, len(PLANTED)))
    z = (rng.random((num, M)) < 0.3) * (0.5 + rng.random((num, M)))
    x = z @ directions + sum(1.5 * (z[:, i] * z[:, j])[:, None] * b for (i, j), b in zip(PLANTED, both, strict=True))
    return {"inputs": x.astype(np.float32), "codes": z.astype(np.float32), "labels": (z[:, 0] > 0).astype(np.int32)}


def build(steps=(60, 60), decoder=True, batch_size=256):
    """Returns a run of two phases, a linear and a quadratic decoder; ``steps`` are theirs."""
    examples = planted()
    learn, test = ({name: x[part] for name, x in examples.items()} for part in (slice(5000), slice(5000, None)))
    data = train.array_data(learn, batch_size=batch_size, evaluate={"eval": test}, eval_batch_size=batch_size)
    make = DecoderTask if decoder else PolySAETask
    tasks = [make(D, M, 4, (M, 8, 8), order, warmup=20, dead_after=5) for order in (1, 2)]

    def phase(name, task, num_steps):
        rate = optax.cosine_decay_schedule(1e-2, num_steps)
        tx = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(lambda count: rate(jnp.asarray(count, jnp.float32)))
        )
        return train.Phase(name, task, data, num_steps, tx)

    phases = tuple(itertools.starmap(phase, zip(("linear", "quadratic"), tasks, steps, strict=True)))
    return train.Run(phases, best="max:variance/explained")
