"""A language model whose hidden states are decoupled from a dominant domain, as a task (arXiv 2508.12803)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from subspace_jax import metrics, train
from subspace_jax.data import text
from subspace_jax.language.adapted import AdaptedLMTask
from subspace_jax.language.causal_lm import CausalLMTask
from subspace_jax.losses.decoupling import OnlineDecoupler

_PROBED = 64  # positions of an example that the evaluation takes
_FITTED = 4096  # states at most that fit a probe of the evaluation, for its cost on the host


class DecoupledLMTask(train.Task):
    """Next-token prediction with a penalty on hidden states that lie in the subspace of a domain.

    Batches have ``domains [batch, length]`` beside those of the task: int32, -1 for padding.  Each chosen hidden state
    has a probe and a subspace of its own, ``variables["decoupler"]``, stacked along the first axis.  A batch goes into
    the reservoirs in the loss, the same positions for all; the subspaces are estimated after the step.

    Args:
      task: The task.
      decoupler: The decoupler of one hidden state.
      weight: Factor on the mean of the penalties.
      layers: Which hidden states, of those that :func:`subspace_jax.nn.causal_lm_apply` gives: 0 for the embeddings,
        -1 for the last one, after the final norm; none for all.

    Raises:
      ValueError: ``weight`` is negative, or there is no such hidden state.
    """

    def __init__(
        self, task: CausalLMTask | AdaptedLMTask, decoupler: OnlineDecoupler, *, weight: float, layers: Sequence[int]
    ):
        if not weight >= 0:
            raise ValueError(f"weight: expected at least 0, got {weight}")
        states = task.config.num_layers + 1
        if any(not -states <= i < states for i in layers):
            raise ValueError(f"layers: expected hidden states 0 to {states - 1}, got {tuple(layers)}")
        self.task, self.decoupler, self.frozen = task, decoupler, task.frozen
        self.layers = tuple(sorted({i % states for i in layers or range(states)}))
        self._weight = weight

    def init(self, key):
        """Returns what the task returns, with fresh decouplers among the variables."""
        params, variables = self.task.init(key)
        return params, {**variables, "decoupler": self._fresh(jax.random.fold_in(key, 1))}

    def axes(self):
        """Returns the logical axis names of parameters and variables; decouplers are on every device."""
        params, variables = self.task.axes()
        shapes = jax.eval_shape(self._fresh, jax.random.key(0))
        return params, {**variables, "decoupler": jax.tree.map(lambda x: P(*(None,) * x.ndim), shapes)}

    def roles(self):
        """Returns the roles of the task."""
        return self.task.roles()

    def load(self, shardings):
        """Returns what the task loads, with fresh decouplers among the variables."""
        own = shardings[1]["decoupler"]
        start = self.task.load((shardings[0], {name: x for name, x in shardings[1].items() if name != "decoupler"}))
        if start is None:
            return None
        fresh = train.jit_on_mesh(self._fresh, jax.tree.leaves(own)[0].mesh, own)
        return start[0], {**start[1], "decoupler": fresh(jax.random.key(0))}

    def restore_frozen(self, variables, shardings):
        """Returns the frozen entries of the task."""
        return self.task.restore_frozen(variables, shardings)

    def loss(self, params, variables, batch, *, key, step):
        """Returns the loss of the task and the weighted penalty, both as metrics too.

        ``share`` is the mean of ``||q^T h|| / ||h||``: it falls only where states rotate out of the subspace.
        """
        del step
        loss, found, hidden = self.task.loss_and_states(params, variables, batch, key=key, layers=self.layers)
        decouplers, domains = variables["decoupler"], batch["domains"]
        penalty, share = (
            jnp.mean(jax.vmap(measure, (0, 0, None))(decouplers, hidden, domains))
            for measure in (self.decoupler.penalty, self.decoupler.share)
        )
        observe = jax.vmap(self.decoupler.observe, (0, 0, None, None))
        decouplers = observe(decouplers, hidden, domains, jax.random.fold_in(key, 1))
        found = {**found, "task_loss": loss, "penalty": penalty, "share": share}
        return loss + self._weight * penalty, ({**variables, "decoupler": decouplers}, found)

    def after_update(self, params, variables, *, key, step):
        """Returns the decouplers with new subspaces, where they are due."""
        del step
        state = variables["decoupler"]
        state = state._replace(step=state.step + 1)
        state = jax.lax.cond(
            self.decoupler.due(state.step[0]),
            jax.vmap(self.decoupler.update),
            lambda state, keys: state,
            state,
            jax.random.split(key, len(self.layers)),
        )
        return params, {**variables, "decoupler": state}

    def evaluate(self, params, variables, batch, *, key):
        """Returns the sums of the task, without a penalty."""
        return self.task.evaluate(params, variables, batch, key=key)

    def evaluators(self):
        """Returns those of the task, and at the end the probe of its hidden states for the target."""
        return {**super().evaluators(), "domains": _DomainProbe(self)}

    def states(self, params, variables, batch) -> jax.Array:
        """Returns the chosen hidden states, ``[layers, batch, length, d]``."""
        return self.task.loss_and_states(params, variables, batch, layers=self.layers)[2]

    def _fresh(self, key):
        width = self.task.config.hidden_size
        return jax.vmap(lambda key: self.decoupler.init(key, width))(jax.random.split(key, len(self.layers)))


class _DomainProbe(train.Evaluator):
    """Balanced accuracy of fresh probes, "target or not", on hidden states at evenly spaced positions.

    Every other example of the set trains the probes and the rest tests them, and the other way round; the mean is over
    both and over the chosen layers.
    """

    reduce = "rows"
    metrics = ("probe_accuracy", "weighted_probe_accuracy")
    last = True

    def __init__(self, task: DecoupledLMTask):
        self._task = task

    def collect(self, model, batch, *, key):
        del key
        length = batch["domains"].shape[1]
        chosen = np.arange(min(_PROBED, length)) * length // min(_PROBED, length)
        hidden = self._task.states(*model, batch)[:, :, chosen]
        return jnp.moveaxis(hidden, 0, 2).astype(jnp.float32), batch["domains"][:, chosen]

    def finish(self, eval):
        states, domains = eval
        halves = []
        for first in (0, 1):
            of = domains[first::2].reshape(-1)
            own, of = states[first::2].reshape(-1, *states.shape[2:])[of >= 0], of[of >= 0]
            halves.append((own, of == self._task.decoupler.target))
        if any(y.all() or not y.any() for _, y in halves):  # too few examples to tell
            return dict.fromkeys(self.metrics, np.nan)

        def mean(weighted):
            found = []
            for (train_x, train_y), (test_x, test_y) in (halves, halves[::-1]):
                fitted = np.random.default_rng(0).permutation(len(train_y))[:_FITTED]
                for i in range(states.shape[2]):
                    own = (train_x[fitted, i], train_y[fitted], test_x[:, i], test_y)
                    found.append(metrics.balanced_probe_accuracy(*own, weighted=weighted))
            return np.mean(found)

        return {"probe_accuracy": mean(False), "weighted_probe_accuracy": mean(True)}


def domains_of(examples: Sequence) -> tuple[str, ...]:
    """Returns the names of the domains of texts, in order.

    Args:
      examples: See :class:`subspace_jax.data.text.DomainCompletion`.

    Raises:
      ValueError: They are of conversations, or one has no domain.
    """
    if not all(isinstance(example, text.Completion) for example in examples):
        raise ValueError(
            "decoupling: expected rows with a text, or a prompt and a completion, and their domain; got conversations"
        )
    if without := sum(not isinstance(example, text.DomainCompletion) for example in examples):
        raise ValueError(
            f"decoupling: {without} of {len(examples)} examples have no domain, expected a text in the field 'domain' "
            "of every row"
        )
    return tuple(sorted({example.domain for example in examples}))


def decoupled(task: CausalLMTask | AdaptedLMTask, config: ConfigDict, domains: Sequence[str]) -> DecoupledLMTask:
    """Returns the task with the fields ``decoupling`` of a config.

    Args:
      task: The task.
      config: The config.
      domains: Names of the domains, in the order of their labels.

    Raises:
      ValueError: A field can't serve; the message names it.
    """
    fields = config.decoupling
    decoupler = train.decoupler_of(fields, domains)
    try:
        return DecoupledLMTask(task, decoupler, weight=fields.weight, layers=tuple(fields.layers))
    except ValueError as error:
        raise ValueError(f"decoupling.{error}") from error
