"""A program that measures what a load of a language model holds beside its arrays."""

# Arguments: the model, and "mesh" for eight devices; prints bytes beside the arrays, and bytes of the arrays.
MEASURE = """
import resource, sys
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 8)
from subspace_jax import interop, train
mesh = train.make_mesh(1, 4, 2)
shardings = (lambda shapes, axes: train.param_shardings(shapes, axes, mesh)) if sys.argv[2] == "mesh" else None
jnp.zeros(3).block_until_ready()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
params = interop.load_causal_lm(sys.argv[1], shardings=shardings)[1]
total = sum(x.nbytes for x in jax.tree.leaves(params))
print(peak() - before - total, total)
"""
