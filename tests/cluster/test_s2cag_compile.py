"""S2CAG of a graph with 10^8 edges, compiled ahead of time for sixteen chips of TPU v5e."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax.cluster import s2cag
from subspace_jax.cluster.s2cag import core

NODES, SLOTS, PIECES = 10**7, 24, 16 * 10**5  # 2 x 10^8 entries and self-loops, a tenth of the nodes with more


@pytest.mark.slow
@pytest.mark.parametrize(("path", "modular"), [("explicit", False), ("implicit", False), ("explicit", True)])
def test_a_hundred_million_edges_fit_sixteen_chips_of_v5e(path, modular):
    devices = np.asarray(topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices)
    mesh = Mesh(devices.reshape(-1), ("data",), axis_types=(AxisType.Auto,))

    def sharded(shape, dtype):
        spec = P(None, "data") if len(shape) == 2 and shape[0] < NODES else P("data")
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    p = s2cag.GraphOperator(
        idx=sharded((SLOTS, NODES), jnp.int32),
        val=sharded((SLOTS, NODES), jnp.float32),
        more_idx=sharded((16, PIECES), jnp.int32),
        more_val=sharded((16, PIECES), jnp.float32),
        more_row=sharded((PIECES,), jnp.int32),
        scale=sharded((NODES,), jnp.float32),
        nodes=NODES,
        entries=21 * 10**7,
        mesh=mesh,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    options = core.Options(tau=7, path=path)
    lowered = core.fit_labels.lower(key, p, sharded((NODES, 64), jnp.float32), 10, options, modular)
    memory = lowered.compile().memory_analysis()
    parts = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "temp")}
    print(f"\n{path}, modular {modular}: bytes per chip {parts}")
    assert sum(parts.values()) < 16e9
