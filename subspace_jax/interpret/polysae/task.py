"""Sparse autoencoders by a train loop, on vectors or on the activations of a language model."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from subspace_jax import train
from subspace_jax.interpret.polysae import core
from subspace_jax.interpret.polysae.activations import ResidualStream, usual
from subspace_jax.interpret.polysae.evaluate import Reconstruction
from subspace_jax.interpret.polysae.model import axes_of_param
from subspace_jax.interpret.polysae.settings import PolySAEConfig
from subspace_jax.interpret.polysae.shards import Shards

PyTree = Any


class PolySAETask(train.Task):
    """A sparse autoencoder as a :class:`subspace_jax.train.Task`.

    Batches hold ``inputs [batch, d]``, or with ``stream`` the packed rows of texts whose activations are computed
    within the step.  Counters, threshold, scale and center are variables, and so are the weights of the language model,
    which no checkpoint holds where they are those of a folder.  Features are sharded along ``tensor``: columns of the
    encoder and rows of the decoder's factor.

    With a code that depends on the whole batch (BatchTopK) accumulation is refused.

    Args:
      config: The autoencoder.
      stream: Where activations come from; None takes those of the batch.
      scale: Factor of the activations; 0 measures it on ``sample`` when the run begins, so that the median norm of
        centered activations is ``sqrt(d)``.
      sample: A batch whose median activation is subtracted from all; None subtracts nothing.
      seed: Seed of the parameters of a run with a folder or a sample.

    Raises:
      ValueError: The stream has another width, or the scale can't be measured.
    """

    def __init__(
        self,
        config: PolySAEConfig,
        *,
        stream: ResidualStream | None = None,
        scale: float = 1.0,
        sample: Mapping[str, np.ndarray] | None = None,
        seed: int = 0,
    ):
        if stream is not None and stream.config.hidden_size != config.d_in:
            raise ValueError(f"d_in: expected {stream.config.hidden_size}, the model's width, got {config.d_in}")
        if not scale >= 0:
            raise ValueError(f"scale: expected a number above 0, or 0 to measure it, got {scale}")
        if scale == 0 and sample is None:
            raise ValueError("scale: expected a number above 0, as there is no sample to measure it on")
        self.config, self.stream = config, stream
        self._scale, self._sample, self._seed = scale, sample, seed
        self.splittable = not config.whole_batch
        self.frozen = ("model",) if stream is not None and stream.folder is not None else ()

    def init(self, key):
        """Returns fresh parameters, and counters."""
        params, variables = self._fresh(key)
        if self.stream is not None:
            variables["model"] = self.stream.init(jax.random.fold_in(key, 1))
        return params, variables

    def _fresh(self, key):
        state = core.init_state(self.config)
        variables = {**state._asdict(), "fired": jnp.zeros(self.config.d_sae, bool)}
        measured = {"scale": jnp.asarray(self._scale or 1.0), "center": jnp.zeros(self.config.d_in)}
        return core.init_params(key, self.config), {**variables, **measured}

    def axes(self):
        """Returns the logical axis names of parameters and variables."""
        params, variables = jax.eval_shape(self._fresh, jax.random.key(0))
        names = {name: axes_of_param(name, x.ndim) for name, x in params.items()}
        others = {name: P("mlp") if name in ("steps_since_fired", "fired") else P() for name in variables}
        return names, others if self.stream is None else {**others, "model": self.stream.axes}

    def roles(self):
        """Returns that no weight decay acts on anything but the encoder: it would move U off its manifold."""
        return {name: "no_decay" for name in self.axes()[0] if name != "W_enc"}

    def load(self, shardings):
        """Returns fresh parameters with the model of the folder, and what is measured on the sample."""
        if not self.frozen and self._sample is None:
            return None
        mesh, key = jax.tree.leaves(shardings)[0].mesh, jax.random.key(self._seed)
        others = {name: s for name, s in shardings[1].items() if name != "model"}
        params, variables = train.jit_on_mesh(self._fresh, mesh, (shardings[0], others))(key)
        model = {}
        if self.frozen:
            model = {"model": self.stream.load(shardings[1]["model"])}
        elif self.stream is not None:
            draw = train.jit_on_mesh(self.stream.init, mesh, shardings[1]["model"])
            model = {"model": draw(jax.random.fold_in(key, 1))}
        if self._sample is not None:
            # One program of the whole sample on every process, and so one scale.
            measure = train.jit_on_mesh(self._measured, mesh, (others["scale"], others["center"]))
            variables["scale"], variables["center"] = measure(model, dict(self._sample))
        return params, {**variables, **model}

    def _measured(self, model, batch):
        """Returns the scale, and the scaled mean of a batch, by medians: a few outliers must not move them."""
        x, weights = self._read(model, batch)
        counted = jnp.where(weights > 0, 0.0, jnp.nan)
        mean = jnp.nan_to_num(jnp.nanmedian(x + counted[:, None], axis=0))
        norm = jnp.nan_to_num(jnp.nanmedian(jnp.linalg.norm(x - mean[None], axis=1) + counted))
        scale = jnp.asarray(self._scale) if self._scale else math.sqrt(self.config.d_in) / jnp.maximum(norm, 1e-30)
        return scale, scale * mean

    def restore_frozen(self, variables, shardings):
        """Returns the model of the folder again."""
        return {"model": self.stream.load(shardings["model"])}

    def activations(self, variables: PyTree, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Returns ``scale x - center`` of activations ``[examples, d]`` float32, and which count, ``[examples]``.

        Outliers of a language model do not, see :func:`usual`.
        """
        x, weights = self._read(variables, batch)
        x = train.constrain(x * variables["scale"] - variables["center"][None], ("batch", None))
        if self.stream is not None and self._sample is not None:
            weights = jnp.where(usual(x), weights, 0)
        return x, train.constrain(weights, ("batch",))

    def _read(self, variables, batch):
        if self.stream is not None:
            return self.stream(variables["model"], batch)
        x = batch["inputs"].astype(jnp.float32)
        return x, batch["mask"] if "mask" in batch else jnp.ones(len(x))

    def loss(self, params, variables, batch, *, key, step):
        """Returns the loss of :func:`poly_sae_loss`, with its terms, L0 and the share of dead features as metrics."""
        del key
        x, weights = self.activations(variables, batch)
        names = self.feature_names()
        state = core.SAEState(variables["steps_since_fired"], variables["threshold"])
        given = (P("batch"), P("batch"), core.SAEState(P(names), P()), P())
        out = (P(), {name: P() for name in ("mse", "aux", "inner", "sparsity", "l0", "threshold")}, P(names))
        loss, found, fired = self.on_shards(_loss, params, (x, weights, state, step), given, out)
        threshold = found.pop("threshold")
        variables = {**variables, "fired": variables["fired"] | fired, "threshold": threshold}
        found["dead"] = jnp.mean((state.steps_since_fired > self.config.dead_after).astype(jnp.float32))
        return loss, (variables, found)

    def after_update(self, params, variables, *, key, step):
        """Retracts the decoder's factors, and counts the steps since each feature has fired."""
        del key, step
        # Rows stay sharded, and Gram matrices are summed.
        held = {n: train.constrain(x, ("mlp", None)) if n.startswith("U") else x for n, x in params.items()}
        since = jnp.where(variables["fired"], 0, variables["steps_since_fired"] + 1)
        fresh = {"steps_since_fired": since, "fired": jnp.zeros_like(variables["fired"])}
        return core.retract(self.config, held), {**variables, **fresh}

    def evaluators(self):
        """Returns explained variance, squared error, L0 and dead features as "eval"."""
        return {"eval": Reconstruction(self)}

    def feature_names(self) -> tuple[str, ...] | None:
        """Returns the mesh axes over which features are sharded; None where there are none that divide them."""
        mesh, axes = train.current_mesh(), train.mesh_axes("mlp")
        ways = math.prod(mesh.shape[axis] for axis in axes) if axes else 1
        return tuple(axes) if ways > 1 and self.config.d_sae % ways == 0 else None

    def on_shards(self, f: Callable, params: PyTree, args: tuple, in_specs: tuple, out_specs: PyTree) -> PyTree:
        """Runs ``f(config, params, shards, *args)`` on each device with its features and its examples.

        Args:
          f: The function, which sums over devices by ``shards``.
          params: Parameters.
          args: Other arguments.
          in_specs: Their specs; ``"batch"`` stands for the axes that shard examples.
          out_specs: Those of the results.
        """
        mesh = train.current_mesh()
        if mesh is None or mesh.size == 1:
            return f(self.config, params, Shards(), *args)
        names, batch = self.feature_names(), train.mesh_axes("batch")
        of_params = {
            name: P(*(names if axis == "mlp" else None for axis in axes_of_param(name, x.ndim)))
            for name, x in params.items()
        }
        given = jax.tree.map(lambda spec: P(batch) if spec == P("batch") else spec, in_specs)
        own = functools.partial(f, self.config)
        shards = Shards(batch, names or ())
        return jax.shard_map(
            lambda params, *args: own(params, shards, *args),
            mesh=mesh,
            in_specs=(of_params, *given),
            out_specs=out_specs,
            check_vma=False,
        )(params, *args)


def _loss(config, params, shards, x, weights, state, step):
    loss, parts = core.poly_sae_loss(config, params, x, state, step=step, weights=weights, shards=shards)
    names = ("mse", "aux", "sparsity", "l0", "threshold")
    found = {name: getattr(parts, name) for name in names} | {"inner": jnp.sum(parts.inner)}
    return loss, found, parts.fired
