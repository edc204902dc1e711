"""Two trained networks of each kind: digits here, and the logits of two MNIST networks where they are."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import linalg, metrics
from subspace_jax.interpret import convergent_learning as convergent

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
# google/svcca's logits.npz (Apache-2.0): net0 and net1, [10, 10000].
LOGITS = [folder / "data" / "svcca-mnist-logits" / "logits.npz" for folder in (ROOT / "work", ROOT.parent / "shared")]
PAIRS, STEPS = 3, 400


def digits():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    pixels, labels = (pixels[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    return (pixels[:1200], labels[:1200]), (pixels[1200:], labels[1200:])


def networks(count):
    """Hidden units and logits of networks 64-32-10 on the test set, each of a seed of its own."""
    (train_x, train_y), (test_x, test_y) = digits()
    tx = optax.adam(5e-3)

    def apply(params, x):
        hidden = jax.nn.relu(x @ params["w"] + params["b"])
        return hidden, hidden @ params["v"] + params["c"]

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, train_x)[1], train_y).mean()

    def trained(key):
        first, second = jax.random.split(key)
        params = {
            "w": jax.random.normal(first, (64, 32)) / 8,
            "b": jnp.zeros(32),
            "v": jax.random.normal(second, (32, 10)) / np.sqrt(32),
            "c": jnp.zeros(10),
        }

        def step(state, _):
            params, opt_state = state
            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        return apply(jax.lax.scan(step, (params, tx.init(params)), None, STEPS)[0][0], test_x)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        hidden, logits = jax.jit(jax.vmap(trained))(jax.random.split(jax.random.key(0), count))
    accuracy = np.mean(np.argmax(logits, axis=2) == test_y[None], axis=1)
    assert accuracy.min() > 0.93
    return np.asarray(hidden), np.asarray(logits)


def test_two_networks_for_digits_converge_to_like_units(record_property):
    hidden, logits = networks(2 * PAIRS)
    rows = []
    for a, b in zip(range(0, 2 * PAIRS, 2), range(1, 2 * PAIRS, 2), strict=True):
        x, y = (h[:, h.std(axis=0) > 1e-4] for h in (hidden[a], hidden[b]))
        measures = ("linear_cka", "debiased_cka", "semi_match", "max_match")
        found = convergent.compare(x, y, measures=measures, null=convergent.Null(19))
        own = convergent.max_match(convergent.between_correlation(jnp.asarray(logits[a]), jnp.asarray(logits[b])))
        matched, cka = found["max_match"], found["linear_cka"]
        rows.append(
            {
                "semi_match": found["semi_match"].value,
                "max_match": matched.value,
                "max_match_over_shuffled": matched.value / matched.null_mean,
                "linear_cka": cka.value,
                "linear_cka_shuffled": cka.null_mean,
                "calibrated_debiased_cka": found["debiased_cka"].calibrated,
                "logits_matched_with_their_own": np.mean(np.asarray(own.columns) == np.arange(10)),
            }
        )
        assert all(score.p_value == 1 / 20 for score in found.values())
    for name in rows[0]:
        # The worst pair.
        worst = max if name == "linear_cka_shuffled" else min
        record_property(name, float(worst(row[name] for row in rows)))
    for row in rows:
        assert row["max_match"] > 0.55
        assert row["max_match"] <= row["semi_match"]
        assert row["max_match_over_shuffled"] > 5
        assert row["linear_cka"] > 0.9
        assert row["logits_matched_with_their_own"] == 1


def test_two_mnist_networks_are_compared_as_their_authors_report(x64, record_property):
    path = next((path for path in LOGITS if path.is_file()), None)
    if path is None:
        pytest.skip("needs logits.npz of google/svcca's tutorial in work/data/svcca-mnist-logits")
    with np.load(path) as archive:
        x, y = (jnp.asarray(archive[name].T.astype(np.float64)) for name in ("net0", "net1"))
    rho = [0.946246, 0.920247, 0.905424, 0.883260, 0.847350, 0.777148, 0.736530, 0.574116, 0.376654, 0.090288]
    np.testing.assert_allclose(linalg.cca(x, y).rho, rho, atol=1e-5)
    np.testing.assert_allclose(metrics.linear_cka(x, y), 0.437452, atol=1e-5)
    np.testing.assert_allclose(metrics.procrustes_similarity(x, y), 0.707687, atol=1e-5)
    c = convergent.between_correlation(x, y)
    np.testing.assert_allclose(np.diagonal(c), [0.52, 0.56, 0.57, 0.66, 0.70, 0.50, 0.65, 0.59, 0.53, 0.78], atol=0.005)
    semi, matched = convergent.semi_match(c), convergent.max_match(c)
    np.testing.assert_array_equal(matched.columns, np.arange(10))
    np.testing.assert_allclose(matched.values.mean(), 0.605811, atol=1e-5)
    np.testing.assert_array_equal(semi.columns, [0, 1, 2, 3, 4, 5, 6, 7, 9, 9])
    record_property("mnist_max_match", float(matched.values.mean()))
    # The same from a stream, and calibrated.
    found = convergent.compare(np.asarray(x), np.asarray(y), null=convergent.Null(19, 1000))
    np.testing.assert_allclose(found["linear_cka"].value, 0.437452, atol=1e-5)
    np.testing.assert_allclose(found["cca_mean"].value, np.mean(rho), atol=1e-5)
    assert all(score.p_value == 1 / 20 for score in found.values())
