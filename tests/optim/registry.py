"""Every public Optax transform, with what the contract battery needs to run it.

A new transform joins by entries in ``ENTRIES``: one for each variant that takes another path through the code.  The
first entry of a method is in the quick run, the first of a kind in all tests of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from subspace_jax import linalg, optim

PyTree = Any

_BOTH_AXES = P("data", "model")


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One variant of a transform.

    Attributes:
      id: Name of the variant in test reports.
      public: Name in ``subspace_jax.optim.__all__`` that this covers.
      factory: Returns the transform; takes ``kwargs`` and the step size under the name ``rate``.
      params: Returns example parameters, float32.
      check: ``check(params, tolerance)`` asserts what must hold of parameters after a step; nothing by default.
      rate: Keyword of the step size, a number or a schedule.
      kwargs: All other options.
      static: Names of options that fix shapes or branches, which ``optax.inject_hyperparams`` must leave alone.
      needs_params: Whether ``update`` refuses to run without parameters.
      extra_args: Returns the extra arguments of ``update``, if it needs any.
      same_code: Whether another entry runs the same code and this one is a thin form of it: tests that compile a step
        anew pass it over.
      layout: PartitionSpec over the mesh axes "data" (4) and "model" (2), for every leaf of the parameters or a tree.
    """

    id: str
    public: str
    factory: Callable[..., optax.GradientTransformation]
    params: Callable[[], PyTree]
    check: Callable[[PyTree, float], None] = lambda params, tolerance: None
    rate: str = "learning_rate"
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    static: tuple[str, ...] = ()
    needs_params: bool = True
    extra_args: Callable[[], dict] = dict
    layout: PyTree = _BOTH_AXES
    same_code: bool = False

    def make(self, rate=0.1) -> optax.GradientTransformationExtraArgs:
        """The transform, with this step size."""
        return optax.with_extra_args_support(self.factory(**{self.rate: rate}, **self.kwargs))

    def gradients(self, params: PyTree, seed: int) -> PyTree:
        """Gaussian gradients in the dtypes of the parameters."""
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)


@functools.cache
def stacks_of_bases() -> PyTree:
    """Two dimensions of subspaces as two leaves; all axes but the last divide among 8 devices."""
    keys = jax.random.split(jax.random.key(7), 2)
    return {"bases": tuple(linalg.random_orthonormal(key, 8, k, (8,)) for key, k in zip(keys, (2, 3), strict=True))}


@functools.cache
def head_on_a_layer() -> PyTree:
    return {"layer": {"kernel": jnp.linspace(-1, 1, 64, dtype=jnp.float32).reshape(8, 8)}, "head": stacks_of_bases()}


def orthonormal(params: PyTree, tolerance: float) -> None:
    for s in jax.tree.leaves(params):
        assert float(jnp.max(linalg.orthonormality_error(s))) <= tolerance


@functools.cache
def stacks_of_kernels() -> PyTree:
    """Tall and wide kernels, one of them a stack, and one that the rule of ranks leaves alone."""
    rng = np.random.default_rng(11)
    shapes = {"tall": (8, 8, 4), "wide": (8, 16), "embedding": (16, 4)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


@functools.cache
def stacks_of_large_kernels() -> PyTree:
    """The same with more columns than a sketch has; shapes for which no gradient has near singular values."""
    rng = np.random.default_rng(12)
    shapes = {"tall": (4, 6, 6), "wide": (8, 16), "embedding": (16, 4)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def rank_but_for_embeddings(path: str, shape: tuple[int, ...]) -> int | None:
    return None if "embedding" in path or len(shape) < 2 else 3


def axis_but_for_embeddings(path: str, shape: tuple[int, ...]) -> jax.Array | None:
    return None if "embedding" in path or len(shape) < 2 else jnp.eye(shape[-2], 2)


@functools.cache
def pairs_of_factors() -> PyTree:
    """A stack of pairs and another leaf; every shape occurs once."""
    rng = np.random.default_rng(13)
    shapes = {"q": {"a": (2, 8, 2), "b": (2, 2, 16)}, "other": (16, 4)}
    return jax.tree.map(lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32), shapes, is_leaf=is_shape)


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def with_energies(tx):
    """Gives a transform energies for all pairs, of gradients that it makes up of the factors' own."""

    def energies(tree):
        if isinstance(tree, Mapping) and tree.keys() == {"a", "b"}:
            return {"": tuple(jnp.sum(jnp.square(tree[name]), axis=axis) for name, axis in (("a", -1), ("b", -2)))}
        children = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, tuple) else ()
        found = {(name, path): e for name, child in children for path, e in energies(child).items()}
        return {f"{name}/{path}".rstrip("/"): e for (name, path), e in found.items()}

    def update(updates, state, params=None, **extra_args):
        return tx.update(updates, state, params, energies=energies(updates), **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def adaprelora_with_energies(learning_rate, b1=0.9, damping_rel=1e-2, weight_decay=0.1):
    options = {"b1": b1, "damping_rel": damping_rel, "weight_decay": weight_decay}
    return with_energies(optim.adaprelora(learning_rate, **options))


def in_a_chain(scale_by, **options):
    """A factory that has the step size after ``scale_by``."""

    def factory(step_size):
        return optax.chain(scale_by(**options), optax.scale_by_learning_rate(step_size))

    return factory


def descent_outside(learning_rate, bases):
    return optax.chain(optim.project_out(bases), optax.scale_by_learning_rate(learning_rate))


def outputs_but_for_embeddings(path: str, shape: tuple[int, ...]) -> jax.Array | None:
    return None if "embedding" in path or len(shape) < 2 else jnp.eye(shape[-1], 2)


def descent_of_outputs(learning_rate, bases, mode="orth"):
    return optax.chain(optim.project_gradient(bases, mode), optax.scale_by_learning_rate(learning_rate))


def projected_momentum(
    learning_rate, side="std", method="subspace_iteration", moments="keep", refresh_every=2, fallback=None
):
    inner = optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(learning_rate))
    options = optim.ProjectionOptions(side, refresh_every, method, moments=moments)
    return optim.low_rank_projection(inner, rank_but_for_embeddings, options, fallback=fallback)


def quantized_galore(learning_rate, dtype="int8"):
    return optim.quantize_state(optim.galore(learning_rate, rank_but_for_embeddings, refresh_every=2), dtype)


def quantized_momentum(learning_rate):
    return optim.quantize_state(projected_momentum(learning_rate, method="random"), "int8")


def galore_in_a_chain(step_size, rank=2, side="std"):
    return optax.chain(
        optim.scale_by_galore(rank, optim.ProjectionOptions(side)), optax.scale_by_learning_rate(step_size)
    )


def decayed_sgd_and_riemannian_sgd(learning_rate):
    euclidean = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(learning_rate))
    return optim.with_geometry(euclidean, optim.riemannian_sgd(learning_rate))


_BASES = {"params": stacks_of_bases, "check": orthonormal}
_SGD = {"public": "riemannian_sgd", "factory": optim.riemannian_sgd, **_BASES}
_ADAM = {"public": "riemannian_adam", "factory": optim.riemannian_adam, **_BASES}

# Where the specs of two leaves differ by a trailing None only, JAX may give results the other one's and compile twice.
_KERNEL_LAYOUT = {"tall": P("data", None, "model"), "wide": P("model", "data"), "embedding": P("data", "model")}
_KERNELS = {"params": stacks_of_kernels, "needs_params": False, "layout": _KERNEL_LAYOUT}
_STATIC = ("rank", "refresh_every", "rounds", "seed", "weight_dimension_numbers")
_PROJECTED = {"public": "low_rank_projection", "factory": projected_momentum, **_KERNELS, "static": ("refresh_every",)}
_GALORE = {"public": "galore", "factory": optim.galore, **_KERNELS, "static": _STATIC}
_FIRA = {**_GALORE, "public": "fira", "factory": optim.fira}


def near_orthogonal_descent(learning_rate, weight=0.5, lam=1.0, kappa=20.0):
    regularizer = optim.add_lambda_orthogonality(weight, lam, kappa)
    return optax.chain(regularizer, optax.scale_by_learning_rate(learning_rate))


_PAIRS = {
    "params": pairs_of_factors,
    "layout": {"q": {"a": P(None, "data"), "b": P(None, None, "model")}, "other": P("data", "model")},
}

ENTRIES = (
    Entry("riemannian-sgd", **_SGD),
    Entry("riemannian-sgd-without-momentum", **_SGD, kwargs={"momentum": None, "reorth_every": None}),
    Entry("riemannian-sgd-parallel-qr", **_SGD, kwargs={"transport": "parallel", "retraction": "qr", "dampening": 0.1}),
    Entry(
        "riemannian-sgd-project-cayley",
        **_SGD,
        kwargs={"transport": "project", "retraction": "cayley", "lr_factor": 0.5},
    ),
    Entry(
        "scale-by-riemannian-sgd-polar",
        public="scale_by_riemannian_sgd",
        factory=optim.scale_by_riemannian_sgd,
        rate="step_size",
        kwargs={"retraction": "polar", "reorth_every": 1},
        **_BASES,
    ),
    Entry("riemannian-adam", **_ADAM),
    Entry("riemannian-adam-euclidean-qr", **_ADAM, kwargs={"transport": "euclidean", "retraction": "qr"}),
    Entry(
        "scale-by-riemannian-adam",
        public="scale_by_riemannian_adam",
        factory=optim.scale_by_riemannian_adam,
        rate="step_size",
        kwargs={"transport": "project", "reorth_every": 2},
        **_BASES,
    ),
    Entry(
        "with-geometry",
        public="with_geometry",
        factory=decayed_sgd_and_riemannian_sgd,
        params=head_on_a_layer,
        check=lambda params, tolerance: orthonormal(params["head"], tolerance),
    ),
    Entry("low-rank-projection", **_PROJECTED),
    Entry(
        "low-rank-projection-full-svd-rotated",
        **_PROJECTED,
        kwargs={"side": "full", "method": "svd", "moments": "rotate"},
    ),
    Entry(
        "low-rank-projection-random-reset-fallback",
        **_PROJECTED,
        kwargs={"method": "random", "moments": "reset", "fallback": optax.sgd(0.1)},
    ),
    Entry("galore", **_GALORE, kwargs={"rank": rank_but_for_embeddings, "refresh_every": 2}),
    Entry(
        "galore-decayed-left-randomized",
        **{**_GALORE, "needs_params": True},
        kwargs={"rank": 2, "side": "left", "method": "randomized", "weight_decay": 0.1},
    ),
    Entry(
        "scale-by-galore",
        public="scale_by_galore",
        factory=galore_in_a_chain,
        rate="step_size",
        kwargs={"side": "reverse_std"},
        static=("rank",),
        **_KERNELS,
    ),
    Entry("fira-random", **_FIRA, kwargs={"rank": 2, "refresh_every": 2, "method": "random"}),
    Entry("fira", **_FIRA, kwargs={"rank": 2, "refresh_every": 2}),
    Entry(
        "apollo",
        public="apollo",
        factory=optim.apollo,
        **_KERNELS,
        static=("rank", "refresh_every", "seed"),
        kwargs={"rank": 2},
    ),
    Entry("apollo-mini", public="apollo_mini", factory=optim.apollo_mini, **_KERNELS, static=("refresh_every", "seed")),
    Entry(
        "coso",
        public="coso",
        factory=optim.coso,
        params=stacks_of_large_kernels,
        needs_params=False,
        layout=_KERNEL_LAYOUT,
        static=("proj_rank", "sketch_rank", "refresh_every"),
        # With a small eps the last bits of entries near zero, and of vectors of near singular values, are blown up.
        kwargs={
            "proj_rank": rank_but_for_embeddings,
            "sketch_rank": 3,
            "method": "svd",
            "refresh_every": 2,
            "eps": 0.1,
        },
    ),
    Entry(
        "project-out",
        public="project_out",
        factory=descent_outside,
        static=("bases",),
        kwargs={"bases": axis_but_for_embeddings},
        **_KERNELS,
    ),
    Entry(
        "project-gradient",
        public="project_gradient",
        factory=descent_of_outputs,
        static=("bases", "mode"),
        kwargs={"bases": outputs_but_for_embeddings},
        **_KERNELS,
    ),
    Entry(
        "gradient-projection-memory",
        public="gradient_projection_memory",
        factory=optim.gradient_projection_memory,
        static=("bases",),
        kwargs={"bases": axis_but_for_embeddings},
        **_KERNELS,
    ),
    Entry(
        "online-subspace-descent",
        public="online_subspace_descent",
        factory=optim.online_subspace_descent,
        static=("rank", "refresh_every"),
        kwargs={"rank": 2, "refresh_every": 5},
        **_KERNELS,
    ),
    Entry(
        "add-lambda-orthogonality",
        public="add_lambda_orthogonality",
        factory=near_orthogonal_descent,
        **{**_KERNELS, "needs_params": True},
    ),
    Entry("quantized-momentum", public="quantize_state", factory=quantized_momentum, **_KERNELS),
    Entry("quantized-int8", public="quantize_state", factory=quantized_galore, static=("dtype",), **_KERNELS),
    Entry(
        "quantized-bfloat16",
        public="quantize_state",
        factory=quantized_galore,
        static=("dtype",),
        kwargs={"dtype": "bfloat16"},
        **_KERNELS,
    ),
    Entry("adaprelora", public="adaprelora", factory=adaprelora_with_energies, **_PAIRS),
    Entry(
        "scale-by-adaprelora-projected-transported",
        public="scale_by_adaprelora",
        factory=in_a_chain(
            optim.scale_by_adaprelora, options=optim.AdaPreLoRAOptions(transport=True, clip_rms=1.0), stats="projected"
        ),
        rate="step_size",
        **_PAIRS,
    ),
    Entry("lora-plus", public="lora_plus", factory=optim.lora_plus, **{**_PAIRS, "needs_params": False}),
    Entry(
        "scale-by-lora-plus",
        public="scale_by_lora_plus",
        same_code=True,
        factory=in_a_chain(optim.scale_by_lora_plus),
        rate="step_size",
        **{**_PAIRS, "needs_params": False},
    ),
    Entry("scaled-gd-lora", public="scaled_gd_lora", factory=optim.scaled_gd_lora, **_PAIRS),
    Entry(
        "scale-by-scaled-gd-lora",
        public="scale_by_scaled_gd_lora",
        same_code=True,
        factory=in_a_chain(optim.scale_by_scaled_gd_lora),
        rate="step_size",
        **_PAIRS,
    ),
    Entry(
        "scaled-adamw-lora",
        public="scaled_adamw_lora",
        factory=optim.scaled_adamw_lora,
        static=("bias_correction", "gauss_seidel"),
        kwargs={"gauss_seidel": True, "weight_decay": 0.1},
        **_PAIRS,
    ),
    Entry(
        "scale-by-scaled-adamw-lora",
        public="scale_by_scaled_adamw_lora",
        same_code=True,
        factory=in_a_chain(optim.scale_by_scaled_adamw_lora),
        rate="step_size",
        **_PAIRS,
    ),
    Entry(
        "lora-rite",
        public="lora_rite",
        factory=optim.lora_rite,
        static=("escape", "balance"),
        kwargs={"balance": True},
        **_PAIRS,
    ),
    Entry(
        "scale-by-lora-rite",
        public="scale_by_lora_rite",
        factory=in_a_chain(optim.scale_by_lora_rite, options=optim.LoRARITEOptions(escape=True, clip_norm=None)),
        rate="step_size",
        **_PAIRS,
    ),
    Entry("lora-pro", public="lora_pro", factory=optim.lora_pro, **_PAIRS),
    Entry(
        "scale-by-lora-pro-sgd",
        public="scale_by_lora_pro",
        same_code=True,
        factory=in_a_chain(optim.scale_by_lora_pro, method="sgd"),
        rate="step_size",
        **_PAIRS,
    ),
)

# Methods whose steps other tests of the quick run compile: those of their own files, and of galore and apollo.
_STEPPED_ELSEWHERE = (
    "low_rank_projection",
    "apollo",
    "apollo_mini",
    "fira",
    "coso",
    "online_subspace_descent",
    "riemannian_sgd",
    "riemannian_adam",
    "quantize_state",
    "with_geometry",
)
# The first entry of each other method, ``scale_by_...`` belonging to the alias.
_FIRST = {entry.public.removeprefix("scale_by_"): entry for entry in reversed(ENTRIES)}
METHODS = tuple(entry for name, entry in _FIRST.items() if name not in _STEPPED_ELSEWHERE)
# One method of each kind of parameters and of state; bases have tests of their own.
KINDS = tuple(e for e in ENTRIES if e.id in ("galore", "adaprelora"))
