"""Training on a stream of tasks with a shared pool of experts, as phases: two for each task.

A reconstruction of iGSP from its abstract (arXiv 2605.19301).  The first phase finds out which historical experts serve
and which new ones are needed, until the router has converged; then the pool is pruned.  The second phase trains the
experts that were kept, outside the historical subspace.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg, train
from subspace_jax.continual.igsp.core import complement_penalty, historical_basis, init_router, routing_change
from subspace_jax.continual.igsp.model import ExpertKernel
from subspace_jax.continual.igsp.pool import (
    ExpertPool,
    candidate_mask,
    check_room,
    expand_pool,
    freeze_pool,
    init_pool,
    prune_pool,
)
from subspace_jax.continual.igsp.state import ContinualState, ExpertSettings, Site
from subspace_jax.continual.igsp.stats import add_task, init_task_stats

PyTree = Any


class ExpertStream(train.Task):
    """A frozen model that meets tasks one after another, with routed experts beside some of its kernels.

    Subclasses say what the model is: :meth:`init_base`, :meth:`base_kernels`, :meth:`objective`, :meth:`features`,
    :meth:`rows` and the evaluators.

    ``params`` are the candidates' factors ``a`` and ``b`` and the ``router`` of the current task, each by site.
    ``variables`` hold ``base``, the :class:`ContinualState` of earlier tasks (``past``), the candidates' ``slots``, the
    ``mask`` of the current router, the number of the ``task``, the ``penalty`` in force, the historical ``basis`` where
    the complement is penalized, and the ``routing`` of the last windows.

    Args:
      sites: Kernels by name.
      settings: See there.
      num_tasks: Tasks that there is room for.
      width: Width of the frozen features by which tasks are told apart.
    """

    def __init__(self, sites: Mapping[str, Site], settings: ExpertSettings, num_tasks: int, width: int):
        if settings.candidates > settings.max_experts:
            raise ValueError(
                f"candidates: expected at most {settings.max_experts}, the experts of a pool, got {settings.candidates}"
            )
        self.sites, self.settings, self.num_tasks, self._width = dict(sites), settings, num_tasks, width

    # What a subclass says of its model.

    def init_base(self, key: jax.Array) -> PyTree:
        """Returns the frozen parameters."""
        raise NotImplementedError

    def base_kernels(self, base: PyTree) -> Mapping[str, jax.Array]:
        """Returns the frozen kernels ``[layers, d_in, d_out]`` by site."""
        raise NotImplementedError

    def objective(
        self, base: PyTree, kernels: Mapping[str, ExpertKernel], task: jax.Array, batch: train.Batch
    ) -> tuple[jax.Array, train.Metrics]:
        """Returns the loss of a batch of the task and metrics, with experts beside the kernels."""
        raise NotImplementedError

    def features(self, base: PyTree, batch: train.Batch) -> jax.Array:
        """Returns frozen features ``[batch, width]``, by which tasks are told apart."""
        raise NotImplementedError

    def rows(self, site: str, batch: train.Batch) -> int:
        """Returns how many inputs a site's kernels see for a batch: its examples, or texts of classes."""
        return next(iter(batch.values())).shape[0]

    # The state.

    def init(self, key):
        """Returns parameters and variables before the first task: an empty pool."""
        keys = jax.random.split(key, len(self.sites) + 1)
        own, pools, routers, masks, slots, mask = self.settings, {}, {}, {}, {}, {}
        params = {"a": {}, "b": {}, "router": {}}
        for k, (name, site) in zip(keys, self.sites.items(), strict=False):

            def pool_of(key, site=site):
                return init_pool(key, own.max_experts, own.rank, site.d_in, site.d_out)

            pools[name] = jax.vmap(pool_of)(jax.random.split(k, site.layers))
            router = init_router(site.d_in if site.routed else 0, own.max_experts)
            slots[name] = _stacked(jnp.arange(own.candidates, dtype=jnp.int32), site.layers)
            params["a"][name], params["b"][name] = _of_slots(pools[name], slots[name])
            params["router"][name] = _stacked(router, site.layers)
            routers[name] = _stacked(_stacked(router, self.num_tasks), site.layers)
            masks[name] = jnp.zeros((site.layers, self.num_tasks, own.max_experts), bool)
            mask[name] = jnp.zeros((site.layers, own.max_experts), bool)
        past = ContinualState(pools, routers, masks, init_task_stats(self.num_tasks, self._width))
        variables = {
            "base": self.init_base(keys[-1]),
            "past": past,
            "slots": slots,
            "mask": mask,
            "task": jnp.zeros((), jnp.int32),
            "penalty": jnp.zeros(()),
            "routing": self._no_routing(),
        }
        if own.complement:
            variables["basis"] = {name: historical_basis(pool)[0] for name, pool in pools.items()}
        return params, variables

    def _no_routing(self):
        zeros = {name: jnp.zeros((site.layers, self.settings.max_experts)) for name, site in self.sites.items()}
        return {
            "sum": zeros,
            "count": jnp.zeros(()),
            "before": jax.tree.map(jnp.copy, zeros),
            "change": jnp.ones(()),
            "calm": jnp.zeros((), jnp.int32),
        }

    def pools(self, params: PyTree, variables: PyTree) -> dict[str, ExpertPool]:
        """Returns the pools of all sites with the candidates as they stand."""
        found = {}
        for name, pool in variables["past"].pool.items():
            place = jax.vmap(lambda whole, slots, new: whole.at[slots].set(new))
            slots = variables["slots"][name]
            a, b = place(pool.a, slots, params["a"][name]), place(pool.b, slots, params["b"][name])
            found[name] = pool._replace(a=a, b=b)
        return found

    @functools.partial(jax.jit, static_argnums=0)
    def learnt(self, params: PyTree, variables: PyTree) -> ContinualState:
        """Returns the state with what the current task has learnt, its candidates not frozen yet."""
        past, task = variables["past"], variables["task"]
        routers = {
            name: jax.tree.map(lambda all_, x: all_.at[:, task].set(x), router, params["router"][name])
            for name, router in past.routers.items()
        }
        masks = {name: mask.at[:, task].set(variables["mask"][name]) for name, mask in past.masks.items()}
        return past._replace(pool=self.pools(params, variables), routers=routers, masks=masks)

    def kernels(self, params: PyTree, variables: PyTree, probe: PyTree = None) -> dict[str, ExpertKernel]:
        """Returns the kernels of all sites for the current task, layers stacked.

        Args:
          params: The parameters.
          variables: The variables.
          probe: Zeros ``[layers, rows, experts]`` by site, whose gradient is the routing; None for no penalty.
        """
        base, layers = self.base_kernels(variables["base"]), sum(site.layers for site in self.sites.values())
        found = {}
        for name, pool in self.pools(params, variables).items():
            penalty = variables["penalty"] / layers * candidate_mask(pool).astype(jnp.float32)
            found[name] = ExpertKernel(
                base[name],
                pool.a,
                pool.b,
                params["router"][name],
                variables["mask"][name] & pool.active,
                penalty=None if probe is None else penalty,
                probe=None if probe is None else probe[name],
                scale=self.settings.scale,
            )
        return found

    def stream_kernels(self, base: PyTree, state: ContinualState, task: jax.Array) -> dict[str, ExpertKernel]:
        """Returns the kernels of all sites where each example goes by the router of a task ``[rows]``, -1 for none."""
        found, kernels = {}, self.base_kernels(base)
        for name, pool in state.pool.items():
            which = jnp.broadcast_to(task[None], (self.sites[name].layers, *task.shape))
            mask = state.masks[name] & pool.active[:, None]
            found[name] = ExpertKernel(
                kernels[name], pool.a, pool.b, state.routers[name], mask, which, scale=self.settings.scale
            )
        return found

    # Training.

    def _loss_of(self, params, variables, probe, batch):
        kernels = self.kernels(params, variables, probe)
        loss, metrics = self.objective(variables["base"], kernels, variables["task"], batch)
        if self.settings.complement:
            outside = [
                jnp.mean(jax.vmap(complement_penalty)(params["a"][name], basis, self._learning(name, variables)))
                for name, basis in variables["basis"].items()
            ]
            weight = jnp.where(variables["penalty"] > 0, self.settings.complement, 0.0)
            loss = loss + weight * jnp.mean(jnp.stack(outside))
        return loss, metrics

    def _learning(self, name, variables):
        """Which candidates of a site are still there, ``[layers, candidates]`` float32."""
        active = candidate_mask(variables["past"].pool[name])
        return jnp.take_along_axis(active, variables["slots"][name], axis=1).astype(jnp.float32)

    def probe(self, batch: train.Batch) -> dict[str, jax.Array]:
        """Returns the zeros whose gradients are the routing probabilities of a batch."""
        experts = self.settings.max_experts
        return {n: jnp.zeros((site.layers, self.rows(n, batch), experts)) for n, site in self.sites.items()}

    def loss(self, params, variables, batch, *, key, step):
        """Returns the loss without the penalty of candidates, which only :meth:`gradients` measures."""
        loss, metrics = self._loss_of(params, variables, None, batch)
        return loss, (variables, metrics)

    def gradients(self, params, variables, batch, *, key, step, wrt=None):
        """Returns the loss with its penalty, and its gradient; the routing is added to that of the window."""

        def of_part(part, probe):
            whole = part if wrt is None else {**params, wrt: part}
            return train.gathered(self, lambda p, v, probe: self._loss_of(p, v, probe, batch))(whole, variables, probe)

        part = params if wrt is None else params[wrt]
        grad = jax.value_and_grad(of_part, argnums=(0, 1), has_aux=True)
        (loss, metrics), (grads, probs) = grad(part, self.probe(batch))
        mean = {name: jnp.mean(p, axis=1) for name, p in probs.items()}
        mass = [
            jnp.sum(p * candidate_mask(variables["past"].pool[name]).astype(p.dtype), -1) for name, p in mean.items()
        ]
        mass = jnp.mean(jnp.concatenate(mass))
        routing = variables["routing"]
        routing = {**routing, "sum": jax.tree.map(jnp.add, routing["sum"], mean), "count": routing["count"] + 1}
        variables = {name: x for name, x in variables.items() if name not in self.frozen} | {"routing": routing}
        loss = loss + variables["penalty"] * mass
        return (loss, (variables, {**metrics, "candidate_probability": mass})), grads

    def after_update(self, params, variables, *, key, step):
        """Compares the mean routing of the windows, at the end of one."""
        routing, own = variables["routing"], self.settings
        ends = (step + 1) % own.window == 0
        now = jax.tree.map(lambda x: x / jnp.maximum(routing["count"], 1), routing["sum"])
        changes = [routing_change(routing["before"][name], now[name]) for name in self.sites]
        change = jnp.max(jnp.stack(changes))
        calm = jnp.where(change < own.tolerance, routing["calm"] + 1, 0)
        new = {**self._no_routing(), "before": now, "change": change, "calm": calm}
        routing = jax.tree.map(lambda x, y: jnp.where(ends, x, y), new, routing)
        return params, {**variables, "routing": routing}

    # Between phases.

    def begun(self, params: PyTree, variables: PyTree, key: jax.Array, task: int) -> tuple[PyTree, PyTree]:
        """Freezes the experts there are, and adds the candidates of a task.

        Args:
          params: The parameters, whose values do not matter.
          variables: The variables, what earlier tasks have learnt in ``past``.
          key: Random key of the candidates.
          task: The number of the task, from 0.

        Returns:
          Parameters and variables at the start of the task's first phase.

        Raises:
          ValueError: The pool of a layer is full, or there is no room for the task.
        """
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"task: expected 0 to {self.num_tasks - 1}, got {task}")
        for pool in variables["past"].pool.values():
            check_room(pool, self.settings.candidates)
        rest = {name: x for name, x in variables.items() if name != "base"}
        params, rest = self._begun(params, rest, key, np.int32(task))
        return params, {**variables, **rest}

    @functools.partial(jax.jit, static_argnums=0)
    def _begun(self, params, variables, key, task):
        own, state = self.settings, variables["past"]
        pools, slots, new = {}, {}, {"a": {}, "b": {}, "router": jax.tree.map(jnp.zeros_like, params["router"])}
        for i, (name, pool) in enumerate(state.pool.items()):
            pool = freeze_pool(pool)
            pools[name] = grown = expand_pool(jax.random.fold_in(key, i), pool, own.candidates, task)
            slots[name] = jnp.argsort(~candidate_mask(grown), axis=-1, stable=True)[:, : own.candidates]
            slots[name] = slots[name].astype(jnp.int32)
            new["a"][name], new["b"][name] = _of_slots(grown, slots[name])
        some = jnp.any(jnp.stack([jnp.any(pool.frozen) for pool in pools.values()]))
        variables = {
            **variables,
            "past": state._replace(pool=pools),
            "slots": slots,
            "mask": {name: jnp.copy(pool.active) for name, pool in pools.items()},
            "task": task,
            "penalty": jnp.where(some, own.penalty, 0.0),
            "routing": self._no_routing(),
        }
        if own.complement:
            variables["basis"] = {name: self.basis(pool) for name, pool in pools.items()}
        return new, variables

    def pruned(
        self, params: PyTree, variables: PyTree, mean_probs: Mapping[str, jax.Array], features: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """Prunes the candidates of the current task, and fixes the experts that it uses.

        Args:
          params: The parameters.
          variables: The variables.
          mean_probs: Mean routing over the training set ``[layers, experts]`` by site.
          features: Frozen features of training examples ``[examples, width]``.

        Returns:
          Parameters and variables at the start of the task's second phase.
        """
        rest = {name: x for name, x in variables.items() if name != "base"}
        # NumPy's, which jit places beside arrays of all processes.
        probs = {name: np.asarray(mean_probs[name], np.float32) for name in self.sites}
        features = np.asarray(features, np.float32)
        for name, x in (("features", features), *probs.items()):
            linalg.check_finite(name, x)
        params, rest = self._pruned(params, rest, probs, features)
        return params, {**variables, **rest}

    @functools.partial(jax.jit, static_argnums=0)
    def _pruned(self, params, variables, mean_probs, features):
        own, past, pools, mask = self.settings, variables["past"], {}, {}
        new = {"a": {}, "b": {}, "router": params["router"]}
        for name, pool in self.pools(params, variables).items():
            pools[name], mask[name] = prune_pool(pool, mean_probs[name], own.tau, relative=own.relative)
            if not own.prune_historical:
                mask[name] = mask[name] | pool.frozen
            new["a"][name], new["b"][name] = _of_slots(pools[name], variables["slots"][name])
        stats = add_task(past.task_stats, variables["task"], features)
        past = past._replace(pool=pools, task_stats=stats)
        variables = {**variables, "past": past, "mask": mask, "penalty": jnp.zeros(()), "routing": self._no_routing()}
        return new, variables

    @functools.partial(jax.jit, static_argnums=0)
    def basis(self, pool: ExpertPool) -> jax.Array:
        """Returns the historical subspace of inputs ``[layers, d_in, q]``, see :func:`historical_basis`."""
        return historical_basis(pool, self.settings.energy, self.settings.max_rank or None)[0]


def _of_slots(pool: ExpertPool, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the factors in some slots ``[layers, n]``."""
    at = slots[..., None, None]
    return jnp.take_along_axis(pool.a, at, axis=1), jnp.take_along_axis(pool.b, at, axis=1)


def _stacked(tree: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (count, *x.shape)), tree)
