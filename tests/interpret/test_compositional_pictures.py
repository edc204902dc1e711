"""R^2 and compositional accuracy of several representations of small pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import spearmanr

from subspace_jax import losses, nn
from subspace_jax.interpret import compositional_linear as cl

pytestmark = pytest.mark.slow

WIDTH, SPLITS = 256, 5


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        yield


def measured(x, labels, n_values):
    """Whitened R^2 in the span of probes of all examples, and accuracy of probes of a tenth of the combinations."""
    keys = jax.random.split(jax.random.key(0), SPLITS + 1)
    probes = cl.fit_concept_probes(keys[0], x, labels, n_values)
    score = cl.linear_factorization_r2(x, labels, n_values, projector=cl.probe_span(probes.weights))
    right = [cl.compositional_accuracy(own, x, labels, n_values).mean for own in keys[1:]]
    return float(score.r2), float(np.mean(right))


def supervised(grid, steps=300):
    """The last hidden layer of a network that was trained to tell all concepts of all pictures."""
    sizes = (grid.x.shape[1], WIDTH, WIDTH, sum(grid.n_values))
    draw, tx = jax.nn.initializers.he_normal(), optax.adam(1e-3)
    keys = jax.random.split(jax.random.key(5), 3)
    layers = [(draw(k, (m, n)), jnp.zeros(n)) for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)]

    def hidden(layers):
        h = grid.x
        for kernel, bias in layers[:-1]:
            h = jax.nn.relu(nn.linear(h, kernel, bias))
        return h

    def loss(layers):
        logits = jnp.split(nn.linear(hidden(layers), *layers[-1]), np.cumsum(grid.n_values)[:-1], axis=1)
        return sum(jnp.mean(losses.cross_entropy(z, grid.labels[:, i])) for i, z in enumerate(logits))

    def step(carry, _):
        layers, state = carry
        updates, state = tx.update(jax.grad(loss)(layers), state)
        return (optax.apply_updates(layers, updates), state), None

    layers = jax.jit(lambda start: jax.lax.scan(step, (start, tx.init(start)), length=steps)[0][0])(layers)
    return hidden(layers)


def test_accuracy_on_new_combinations_rises_with_the_projected_r2_of_pictures(record_property):
    grid = cl.shape_pictures()
    sets = {f"random{n}": cl.random_relu_features(jax.random.key(n), grid.x, n, WIDTH) for n in (5, 4, 3, 1)}
    sets |= {"pixels": grid.x, "supervised": supervised(grid)}
    sets["ideal"] = cl.orthogonal_factor_embedding(jax.random.key(0), grid.n_values, WIDTH, noise=0.02).x
    found = {name: measured(x, grid.labels, grid.n_values) for name, x in sets.items()}
    scores, accuracies = zip(*found.values(), strict=True)
    rank_correlation = float(spearmanr(scores, accuracies).statistic)
    record_property("spearman", rank_correlation)
    for name, (score, accuracy) in found.items():
        record_property(f"{name}_r2", score)
        record_property(f"{name}_accuracy", accuracy)
    assert rank_correlation >= 0.8
    assert found["ideal"][0] >= 0.95
    assert found["ideal"][1] >= 0.95
    assert found["supervised"][1] > found["pixels"][1] + 0.1
