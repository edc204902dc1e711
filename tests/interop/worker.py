"""One of the processes of ``test_processes.py``: ``python -m tests.interop.worker INDEX COUNT PORT SOURCE TARGET``."""

import importlib
import sys

import jax

from subspace_jax import interop, train


def main(index, count, port, source, target):
    jax.config.update("jax_num_cpu_devices", 8 // count)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, index)
    mesh = train.make_mesh(1, 4, 2)

    reader = importlib.import_module("subspace_jax.interop.reading")
    reader.CHUNK_BYTES = 500
    read_shard, bytes_read = reader._read_shard, []

    def counted(*arguments):
        shard = read_shard(*arguments)
        bytes_read.append(shard.nbytes)
        return shard

    reader._read_shard = counted
    config, params = interop.load_causal_lm(
        source, shardings=lambda shapes, axes: train.param_shardings(shapes, axes, mesh)
    )
    assert not params["embed"]["embedding"].is_fully_addressable
    print(f"{index}: read {sum(bytes_read)} of {sum(x.nbytes for x in jax.tree.leaves(params))}")
    interop.save_causal_lm(target, config, params, shard_bytes=30_000)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
