"""Memory of the training step of a Grassmann head with ten million classes on TPU v5p."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from subspace_jax import optim, planning, represent, train

DIM, ROWS = 8, 1024


# Ten million, padded so that the shard of each chip is a whole number of tiles of a TPU's layout.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "width", "axes", "topology"),
    [
        (10_000_128, 384, {"data": 2, "tensor": 32}, "v5p:4x4x4"),
        (10_000_384, 2048, {"data": 1, "tensor": 64}, "v5p:4x4x4"),
        (10_002_432, 2048, {"data": 1, "tensor": 512}, "v5p:8x8x8"),
    ],
    ids=["384 features", "2048 features", "512 chips"],
)
def test_the_step_of_a_grassmann_head_has_temporaries_of_the_size_of_its_bases(classes, width, axes, topology):
    make = functools.partial(
        represent.make_classifier, input_shape=(width,), num_classes=classes, features=(), head="grassmann", dims=DIM
    )
    tx = optim.with_geometry(optax.sgd(0.1), optim.riemannian_sgd(0.1, reorth_every=5))
    mesh = train.make_mesh(**axes, devices=planning.tpu_devices(topology))
    batch = {
        "inputs": jax.ShapeDtypeStruct((ROWS, width), jnp.float32),
        "labels": jax.ShapeDtypeStruct((ROWS,), jnp.int32),
    }
    plan = planning.plan_step(represent.ClassifierTask(make), tx, batch, mesh, topology, finite_check="gradients")
    print(f"\n{plan}")
    shard = classes * width * DIM * 4 // axes["tensor"]
    logits = ROWS // axes["data"] * classes // axes["tensor"] * 4
    assert plan.params == shard
    assert shard <= plan.optimizer < shard + 1000
    assert plan.padding < 1e6
    # The gradient, which the difference of the bases replaces; logits, their exponentials and gradient.
    assert shard <= plan.temporaries < shard + 4 * logits
    assert plan.fits
    # No collective has the size of the bases but the sum of gradients over the batch.
    sent = {c.axis: c.nbytes for c in plan.collectives}
    assert sent["tensor"] < 1e8
    assert set(sent) <= ({"tensor", "data"} if axes["data"] > 1 else {"tensor"})
