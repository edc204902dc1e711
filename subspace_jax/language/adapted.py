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
from subspace_jax.adapters.api import bases_of, replace_at, settings_of
from subspace_jax.adapters.rules import adapters_of, insert, path_of
from subspace_jax.language.causal_lm import CausalLMTask

PyTree = Any

_TARGETS = {
    # The tables of DoRA's paper; the habit of LoRA on GLUE; the released Effort.
    "dora": ("attn/q", "attn/k", "attn/v", "mlp/up", "mlp/down"),
    "svfit": ("attn/q", "attn/v"),
    "effort": ("attn/q", "attn/k", "attn/v", "attn/out"),
}


class AdaptedLMTask(train.Task):
    """Next-token prediction with adapters, as a :class:`subspace_jax.train.Task`.

    ``params`` are the adapters alone: neither the optimizer nor a checkpoint sees the model, which is read from its
    folder into shards whenever a run begins or resumes.  What can't be computed again for certain, singular vectors and
    the factors that PiSSA or Effort take out of a weight, is in the checkpoints as ``variables["start"]``.

    Args:
      config: The model.
      settings: Adapters, see :func:`subspace_jax.adapters.init`.
      folder: Checkpoint folder of the model.  None takes random weights, which are then in the checkpoints.
      base_dtype: Type of the frozen weights; "int8" is for the matrices of the layers, of which those that train as a
        whole stay float32, as do all others.
      seed: Seed of the adapters of a run that starts from a folder.
      probes: Whether energy probes are beside the factors, for :func:`subspace_jax.optim.adaprelora` with "full"; see
        :func:`subspace_jax.adapters.add_gradient_probes`.
      options: Others of :class:`CausalLMTask`: ``dtype``, ``remat``, ``loss_chunk``.

    Raises:
      ValueError: A rule matches no weight, a setting doesn't fit, or a base of int8 is asked for without a folder or
        with a method that needs singular vectors.
    """

    def __init__(
        self,
        config: nn.CausalLMConfig,
        settings: Mapping[str | re.Pattern, Any],
        *,
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
        self._seed = seed
        weights, self._names = nn.param_shapes(config, self._base_dtype), nn.param_axes(config)
        if folder is not None and interop.is_compressed(folder):
            if quantized:
                raise ValueError(f"base_dtype: int8 is for dense kernels, and those of {folder} are compressed")
            weights, self._names = interop.param_shapes_and_axes(folder, self._base_dtype)
        self.shapes, _ = jax.eval_shape(self._draw, jax.random.key(0), weights)
        self._in_int8 = self._int8_rules() if quantized else []
        if quantized and folder is None:
            raise ValueError("base_dtype: int8 weights are of a folder; a random model would be in the checkpoints")
        names = self._quantized(self._names)
        frozen, axes = adapters.logical_axes(names, self.shapes, settings)
        start = _start(frozen, adapters.drop_gradient_probes(axes), self._changing())
        self._axes = axes, {"base": names, "start": start}
        # Weights have keys, and so other axes, where a step drops what adapters see.
        self._lm, self._training = (
            CausalLMTask(config, axes=adapters.bind(frozen, axes, settings, key=key), **options)
            for key in (None, jax.random.key(0))
        )
        # A random model is nowhere else, and so in the checkpoints.
        self.frozen = () if folder is None else ("base",)

    def init(self, key):
        """Returns fresh adapters, and as variables a random model."""
        weights_key, key = jax.random.split(key)
        weights = nn.init_params(weights_key, self.config, self._base_dtype)
        trainable, start = self._draw(key, weights)
        return trainable, {"base": self._based(weights, start), "start": start}

    def axes(self):
        """Returns the logical axis names of parameters and variables."""
        return self._axes

    def roles(self):
        """Returns which parameters have no weight decay, and which are gradient probes."""
        return adapters.roles(self.shapes, self.settings)

    def loss(self, params, variables, batch, *, key, step):
        """Returns the loss of :class:`CausalLMTask`."""
        del step
        loss, metrics, _ = self.loss_and_states(params, variables, batch, key=key)
        return loss, (variables, metrics)

    def loss_and_states(self, params, variables, batch, *, key=None, layers=()):
        """Returns those of :class:`CausalLMTask`; without a key nothing is dropped."""
        bound = adapters.bind(self._frozen(variables), params, self.settings, key=key)
        lm = self._lm if key is None else self._training
        return lm.loss_and_states(bound, {}, batch, key=key, layers=layers)

    def evaluate(self, params, variables, batch, *, key):
        """Returns the sums of :class:`CausalLMTask`."""
        return self._lm.evaluate(adapters.bind(self._frozen(variables), params, self.settings), {}, batch, key=key)

    def merged(self, params: PyTree, variables: PyTree) -> PyTree:
        """Returns the model's parameters with the adapters baked in."""
        merged = adapters.merge(self._frozen(variables), adapters.drop_gradient_probes(params), self.settings)
        merged = adapters.dequantize(merged)
        mesh = jax.tree.leaves(variables)[0].sharding.mesh
        return jax.device_put(merged, train.param_shardings(merged, nn.param_axes(self.config), mesh))

    def _frozen(self, variables):
        """The frozen tree that the adapters are bound to: weights, those of SVFit with their singular vectors."""
        base, start = bases_of(variables["base"]), variables["start"]
        made = {path: config.attach_start(base[path], _at(start, path)) for path, config in self._changing().items()}
        return replace_at(variables["base"], made)

    def _changing(self) -> dict[str, Any]:
        """The adapter configs, by path, whose frozen part is not the weight of the folder."""
        return _changing(self.shapes, self.settings)

    def _draw(self, key, weights):
        """Adapters, and the arrays from which their frozen weights are restored."""
        frozen, trainable = adapters.prepare(key, weights, self.settings)
        # Copies of whole parameters too: a step donates both its parameters and its variables.
        trainable = jax.tree.map(jnp.copy, trainable)
        start = _start(frozen, trainable, _changing(trainable, self.settings))
        return adapters.add_gradient_probes(trainable) if self._probes else trainable, start

    def _rebase(self, weights, start):
        """The weights less the updates with which PiSSA and Effort begin."""
        at = bases_of(weights)
        made = {path: config.restore_base(at[path], _at(start, path)) for path, config in self._changing().items()}
        return replace_at(weights, made)

    def _int8_rules(self) -> list[str]:
        """The matrices of the layers that are frozen."""
        chosen = settings_of(self.shapes, self.settings)
        trained = {path for path, config in chosen.items() if config.trains_weight}
        for path, config in chosen.items():
            if not config.quantizable_base and path not in trained:
                raise ValueError(f"base_dtype: int8 does not serve {config}, at {path}")
        paths = (path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(self._names))
        return [p for p in paths if p.startswith("layers/") and p.endswith("/kernel") and p not in trained]

    def _quantized(self, weights):
        return adapters.quantize(weights, self._in_int8) if self._in_int8 else weights

    def _based(self, weights, start):
        """What stays frozen, in the type in which it is kept."""
        return self._quantized(self._rebase(weights, start))

    def load(self, shardings):
        """Returns fresh adapters and the model of the folder."""
        if self.folder is None:
            return None
        weights = self._read(shardings)
        draw = train.jit_on_mesh(self._draw, _mesh_of(shardings), (shardings[0], shardings[1]["start"]))
        trainable, start = draw(jax.random.key(self._seed), weights)
        return trainable, {"base": self._placed(weights, start, shardings[1]["base"]), "start": start}

    def restore_frozen(self, variables, shardings):
        """Returns the model of the folder again."""
        return {"base": self._placed(self._read(shardings), variables["start"], shardings["base"])}

    def _placed(self, weights, start, shardings):
        # Always by this one program: a resumed run has the same bits as the one that began.
        donated = () if self._in_int8 else (0,)
        return train.jit_on_mesh(self._based, _mesh_of(shardings), shardings, donate_argnums=donated)(weights, start)

    def _read(self, shardings):
        mesh, rules = _mesh_of(shardings), train.current_rules()

        def place(shapes, axes):
            return train.param_shardings(shapes, axes, mesh, rules)

        return interop.load_causal_lm(self.folder, shardings=place, dtype=self._base_dtype)[1]


def _mesh_of(shardings: PyTree) -> Mesh:
    return jax.tree.leaves(shardings)[0].mesh


def _start(base: PyTree, trainable: PyTree, changing: Mapping[str, Any]) -> PyTree:
    """The arrays that restore changed frozen weights, or their logical axes: a nested dict."""
    at, found, start = bases_of(base), adapters_of(trainable), {}
    for path, config in changing.items():
        own = config.start_state(at[path], found[path])
        insert(start, path, {name: x if isinstance(x, P) else jnp.copy(x) for name, x in own.items()})
    return start


def _changing(trainable: PyTree, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {path: config for path, config in settings_of(trainable, settings).items() if not config.keeps_base}


def _at(tree: PyTree, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree


def default_targets(method: str, config: nn.CausalLMConfig) -> list[str]:
    """Returns the rules of the weights that a method adapts where a run says nothing else."""
    names = _TARGETS.get(method, _TARGETS["dora"])
    fused = ("attn/q", "attn/k", "attn/v") if config.fused_qkv else ()
    return list(dict.fromkeys("attn/qkv" if name in fused else name for name in names))
