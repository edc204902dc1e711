import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import pytest

from subspace_jax import linalg

from .cases import gaussian


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_of_each_gives_what_the_factorization_of_the_stack_gives(leading):
    x = jnp.asarray(gaussian(0, *leading, 5, 3), jnp.float32)
    chex.assert_trees_all_close(linalg.of_each(jnp.linalg.qr, x), jnp.linalg.qr(x), rtol=1e-6, atol=1e-6)


def test_of_each_has_the_derivative_of_the_factorization_and_works_under_vmap():
    x = jnp.asarray(gaussian(1, 2, 3, 5, 3), jnp.float32)

    def total(factorize, x):
        return sum(jnp.sum(jnp.sin(part)) for part in factorize(x))

    by_stack = jax.grad(lambda x: total(jnp.linalg.qr, x))(x)
    one_by_one = jax.vmap(jax.grad(lambda x: total(lambda x: linalg.of_each(jnp.linalg.qr, x), x)))(x)
    chex.assert_trees_all_close(one_by_one, by_stack, rtol=1e-5, atol=1e-5)


def test_of_each_has_a_loop_on_cpus_alone():
    x = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)
    traced = jax.jit(lambda x: linalg.of_each(jnp.linalg.eigvalsh, x)).trace(x)
    loops = {platform: "while" in traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")}
    assert loops == {"cpu": True, "tpu": False}


_MANY = """
import jax, jax.numpy as jnp, numpy
from subspace_jax import linalg

rng = numpy.random.default_rng(0)
stacks = [rng.standard_normal((30, 64, 16), numpy.float32) for _ in range(20)]

def factorize(x):
    q, r = linalg.positive_qr(x)
    again, _ = linalg.positive_qr(jnp.sin(q @ r) + x)
    return (q * again).sum() + linalg.of_each(jnp.linalg.eigvalsh, r @ r.mT).sum()

jax.block_until_ready(jax.jit(lambda stacks: [factorize(x) for x in stacks])(stacks))
"""


@pytest.mark.slow
def test_many_factorizations_of_stacks_end():
    # By jnp.linalg.qr and eigvalsh of the stacks, this waits for ever on a machine of two cores.
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", _MANY], env=environment, check=True, capture_output=True, timeout=300)
