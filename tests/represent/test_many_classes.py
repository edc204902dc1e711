"""A Grassmann head over ten million classes, split over a slice of v5p: its loss and gradients fit."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import losses, nn, train

# Ten million, filled up so that each of 32 shares is a whole number of tiles of a TPU's layout.
CLASSES, WIDTH, DIM = 10_000_128, 384, 8


@pytest.mark.slow
def test_the_gradient_of_a_head_over_ten_million_classes_takes_a_share_of_each_chip():
    mesh = train.make_mesh(data=2, tensor=32, devices=train.tpu_devices("v5p:4x4x4"))

    def array(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    bases = array((CLASSES, WIDTH, DIM), P("tensor"))
    features, labels = array((1024, WIDTH), P("data")), array((1024,), P("data"), jnp.int32)

    def loss(bases, x, labels):
        return jnp.mean(losses.cross_entropy(nn.grassmann_logits(x, bases), labels))

    memory = jax.jit(jax.grad(loss), out_shardings=bases.sharding).lower(bases, features, labels).compile()
    memory = memory.memory_analysis()
    print(f"\nbytes per chip: arguments {memory.argument_size_in_bytes}, rest {memory.temp_size_in_bytes}")
    share = CLASSES * WIDTH * DIM * 4 // 32
    assert share <= memory.argument_size_in_bytes < 1.01 * share
    # Logits of 512 rows, their exponentials and gradient among it; the products [512, classes, 8] are not.
    assert memory.temp_size_in_bytes < 4 * 512 * CLASSES * 4 // 32
