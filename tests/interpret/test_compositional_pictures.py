"""R^2 and compositional accuracy of several representations of small pictures; and of people of OpenMoji."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import spearmanr

from subspace_jax import interop, losses, nn, represent
from subspace_jax.interpret import compositional_linear as cl
from subspace_jax.represent import xfactors

pytestmark = pytest.mark.slow

WIDTH = 400
DINO = pathlib.Path(__file__).parents[2] / "work" / "models" / "dinov2-small"


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        yield


def measured(x, labels, n_values):
    """Whitened R^2 in the span of probes of all examples, and accuracy of probes of a tenth of the combinations."""
    keys = jax.random.split(jax.random.key(0), 4)
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


def dino_features(images, params=None):
    """Pooled outputs of DINOv2-small for pictures of 112 x 112, with its weights or with those of an untrained one."""
    model = represent.open_feature_model(DINO, resample=True)
    params = model.params if params is None else params
    inputs = np.stack([model.prepare(image) for image in images])
    ones = np.ones(len(images), np.float32)
    batches = (
        {"inputs": inputs[i : i + 72], "labels": np.zeros(len(inputs[i : i + 72]), np.int32), "mask": ones[i : i + 72]}
        for i in range(0, len(images), 72)
    )
    return represent.extract_features(model.step, params, batches, mesh=model.mesh)[0]


def test_factors_of_openmoji_in_dinov2_small_beside_an_untrained_encoder_and_pixels(record_property):
    if not DINO.is_dir():
        pytest.skip("needs `subspace-jax fetch dinov2-small`")
    people = xfactors.openmoji(112)
    images = np.round(255 * people.images).astype(np.uint8)
    table = cl.LabelTable(people.factors, people.names, people.values)
    config, _ = interop.load_vision(DINO)
    untrained = nn.init_params(jax.random.key(0), config)
    small = people.images.reshape(len(images), 14, 8, 14, 8, 3).mean(axis=(2, 4)).reshape(len(images), -1)
    sets = {"dinov2": dino_features(images), "untrained": dino_features(images, untrained), "pixels": small}
    settings = cl.ReportSettings(0.5, 1, cl.ProbeSettings(epochs=100))
    found = {}
    for name, x in sets.items():
        found[name] = cl.measure_geometry(jax.random.key(0), np.asarray(x, np.float32), table, name, settings)
        record_property(f"{name}_r2_raw", found[name].r2["raw"])
        record_property(f"{name}_r2_projected", found[name].r2["projected"])
        record_property(f"{name}_across", found[name].factor_cosines["across"])
        record_property(f"{name}_accuracy", found[name].accuracy["mean"])
    print(cl.geometry_table(list(found.values()), table))
    assert found["dinov2"].factor_cosines["across"] < found["dinov2"].factor_cosines["within"]
    assert found["dinov2"].accuracy["mean"] > found["untrained"].accuracy["mean"]
