"""Adapters of a frozen causal language model as a task of the train loop."""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from subspace_jax import adapters, interop, nn, train
from subspace_jax.adapters.api import settings_of
from subspace_jax.adapters.quantized import dense_base
from subspace_jax.adapters.rules import insert, path_of
from subspace_jax.language.causal_lm import CausalLMTask

PyTree = Any

_TARGETS = {
    # The tables of DoRA's paper; the habit of LoRA on GLUE; the released Effort.
    "dora": ("attn/q", "attn/k", "attn/v", "mlp/up", "mlp/down"),
    "svfit": ("attn/q", "attn/v"),
    "effort": ("attn/q", "attn/k", "attn/v", "attn/out"),
}


class AdaptedLMTask:
    """Next-token prediction with adapters, as a :class:`subspace_jax.train.Task`.

    ``params`` are the adapters alone: neither the optimizer nor a checkpoint sees the model, which is read from its
    folder, spread over the mesh, whenever a run begins or goes on.  What cannot be found again for certain, singular
    vectors and the factors that PiSSA or Effort take out of a weight, is in the checkpoints as ``variables["start"]``.

    Args:
      config: The model.
      mesh: The mesh of the run.
      settings: Adapters, see :func:`subspace_jax.adapters.init`.
      rules: Logical name to mesh axis or axes.
      folder: Checkpoint folder of the model.  None takes random weights, which are then in the checkpoints.
      base_dtype: Type of the frozen weights; "int8" is for the matrices of the layers, of which those that train as a
        whole stay float32, as do all others.
      seed: Seed of the adapters of a run that starts from a folder.
      probes: Whether energy probes are beside the factors, for :func:`subspace_jax.optim.adaprelora` with "full"; see
        :func:`subspace_jax.adapters.add_energy_probes`.
      options: Others of :class:`CausalLMTask`: ``dtype``, ``remat``, ``loss_chunk``.

    Raises:
      ValueError: A rule matches no weight, a setting doesn't fit, or a base of int8 is asked for without a folder or
        with a method that needs singular vectors.
    """

    def __init__(
        self,
        config: nn.CausalLMConfig,
        mesh: Mesh,
        settings: Mapping[str | re.Pattern, Any],
        *,
        rules: train.Rules = train.DEFAULT_RULES,
        folder: str | os.PathLike | None = None,
        base_dtype: DTypeLike = jnp.float32,
        seed: int = 0,
        probes: bool = False,
        **options: Any,
    ):
        self._probes = probes
        self.config, self.settings, self.folder = config, settings, folder
        quantized = base_dtype == "int8"
        self._base_dtype = jnp.float32 if quantized else base_dtype
        self._mesh, self._rules, self._seed = mesh, rules, seed
        self._names = nn.param_axes(config)
        self.shapes, _ = jax.eval_shape(self._draw, jax.random.key(0), nn.param_shapes(config, self._base_dtype))
        self._in_int8 = self._int8_rules() if quantized else []
        if quantized and folder is None:
            raise ValueError("base_dtype: int8 weights are of a folder; a random model would be in the checkpoints")
        names = self._quantized(self._names)
        frozen, axes = adapters.logical_axes(names, self.shapes, settings)
        start = _start(frozen, adapters.drop_energy_probes(axes), self._changing())
        self._axes = axes, {"base": names, "start": start}
        # Weights have keys, and so other axes, where a step drops what adapters see.
        self._lm, self._training = (
            CausalLMTask(config, mesh, rules=rules, axes=adapters.bind(frozen, axes, settings, key=key), **options)
            for key in (None, jax.random.key(0))
        )
        if folder is not None:
            # Only then: a model that is nowhere else belongs into the checkpoints.
            self.frozen, self.load, self.complete = ("base",), self._load, self._complete

    def init(self, key):
        """Returns fresh adapters, and as variables a random model."""
        weights_key, key = jax.random.split(key)
        weights = nn.init_params(weights_key, self.config, self._base_dtype)
        trainable, start = self._draw(key, weights)
        return trainable, {"base": self._based(weights, start), "start": start}

    def axes(self):
        """Returns the logical axis names of parameters and variables."""
        return self._axes

    def loss(self, params, variables, batch, key):
        """Returns the loss of :class:`CausalLMTask`."""
        bound = adapters.bind(self._frozen(variables), params, self.settings, key=key)
        loss, (_, metrics) = self._training.loss(bound, {}, batch, key)
        return loss, (variables, metrics)

    def evaluate(self, params, variables, batch):
        """Returns the sums of :class:`CausalLMTask`."""
        return self._lm.evaluate(adapters.bind(self._frozen(variables), params, self.settings), {}, batch)

    def merged(self, params: PyTree, variables: PyTree) -> PyTree:
        """Returns the model's parameters with the adapters baked in."""
        merged = adapters.merge(self._frozen(variables), adapters.drop_energy_probes(params), self.settings)
        merged = jax.tree.map(dense_base, merged, is_leaf=lambda x: isinstance(x, adapters.Int8Weight))
        return jax.device_put(merged, self._shardings(merged, self._names))

    def _frozen(self, variables):
        """What the adapters are bound to: weights, those of SVFit with their singular vectors."""
        spectral = {path for path, s in self._changing().items() if isinstance(s, adapters.SVFit)}

        def place(path, w):
            if (name := path_of(path)) not in spectral:
                return w
            return adapters.SpectralBase(w, adapters.SpectralBases(**_at(variables["start"], name)))

        return jax.tree_util.tree_map_with_path(place, variables["base"])

    def _changing(self) -> dict[str, Any]:
        """The settings, by path, whose frozen part is not the weight as it stands in the folder."""
        return _changing(self.shapes, self.settings)

    def _draw(self, key, weights):
        """Adapters, and from what their frozen weights can be made again."""
        frozen, trainable = adapters.prepare(key, weights, self.settings)
        # Copies of whole parameters too: a step donates both its parameters and its variables.
        trainable = jax.tree.map(jnp.copy, trainable)
        start = _start(frozen, trainable, _changing(trainable, self.settings))
        return adapters.add_energy_probes(trainable) if self._probes else trainable, start

    def _rebase(self, weights, start):
        """The weights without what the adapters of PiSSA and Effort begin with."""
        factored = {path: s for path, s in self._changing().items() if not isinstance(s, adapters.SVFit)}
        if not factored:
            return weights
        begun: dict = {}
        for path in factored:
            insert(begun, path, _at(start, path))
        doras = [path for path, setting in factored.items() if isinstance(setting, adapters.DoRA)]
        gains = {path: jnp.ones_like(_at(start, path)["magnitude"]) for path in doras}
        return adapters.unmerge(weights, begun, factored, gains)

    def _int8_rules(self) -> list[str]:
        """The matrices of the layers that stay frozen."""
        for path, setting in self._changing().items():
            if isinstance(setting, adapters.SVFit | adapters.Effort):
                raise ValueError(f"base_dtype: int8 does not serve {setting}, at {path}")
        chosen = settings_of(self.shapes, self.settings)
        whole = {path for path, setting in chosen.items() if isinstance(setting, adapters.Full)}
        paths = (path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(self._names))
        return [p for p in paths if p.startswith("layers/") and p.endswith("/kernel") and p not in whole]

    def _quantized(self, weights):
        return adapters.quantize(weights, self._in_int8) if self._in_int8 else weights

    def _based(self, weights, start):
        """What stays frozen, in the type in which it is kept."""
        return self._quantized(self._rebase(weights, start))

    def _load(self, shardings):
        weights = self._read()
        draw = train.jit_on_mesh(self._draw, self._mesh, (shardings[0], shardings[1]["start"]))
        trainable, start = draw(jax.random.key(self._seed), weights)
        return trainable, {"base": self._placed(weights, start, shardings[1]["base"]), "start": start}

    def _complete(self, variables, shardings):
        return {"base": self._placed(self._read(), variables["start"], shardings["base"])}

    def _placed(self, weights, start, shardings):
        # Always by this one program: a run that goes on has the very bits of the one that began.
        donated = () if self._in_int8 else (0,)
        return train.jit_on_mesh(self._based, self._mesh, shardings, donate_argnums=donated)(weights, start)

    def _read(self):
        return interop.load_causal_lm(self.folder, shardings=self._shardings, dtype=self._base_dtype)[1]

    def _shardings(self, shapes, axes):
        return train.param_shardings(shapes, axes, self._mesh, self._rules)


def _start(base: PyTree, trainable: PyTree, changing: Mapping[str, Any]) -> PyTree:
    """What adapters begin with where that changes the frozen weight: a nested dict of arrays, or of their axes."""
    start: dict = {}
    for path, setting in changing.items():
        if isinstance(setting, adapters.SVFit):
            bases = _at(base, path).bases
            insert(start, path, {"u": bases.u, "vt": bases.vt, "sigma": bases.sigma})
        else:
            own = _at(trainable, path)
            insert(start, path, {name: x if isinstance(x, P) else jnp.copy(x) for name, x in own.items()})
    return start


def _changing(trainable: PyTree, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {path: setting for path, setting in settings_of(trainable, settings).items() if not setting.keeps_base}


def _at(tree: PyTree, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree


def default_targets(method: str, config: nn.CausalLMConfig) -> list[str]:
    """Returns the rules of the weights that a method adapts where a run says nothing else."""
    names = _TARGETS.get(method, _TARGETS["dora"])
    fused = ("attn/q", "attn/k", "attn/v") if config.fused_qkv else ()
    return list(dict.fromkeys("attn/qkv" if name in fused else name for name in names))
