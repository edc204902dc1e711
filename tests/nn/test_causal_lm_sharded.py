"""Language models on meshes: parameters stored in shares, and whole (but for ``tensor``) one layer at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import nn, train

from .lm import CONFIGS, next_token_loss, params_of, tokens_of


def gather(dtype, sharding, x):
    """One array from shares to whole over the axes that split the batch; its gradient goes back to shares at once."""
    whole = NamedSharding(sharding.mesh, P(*(None if axis in ("data", "fsdp") else axis for axis in sharding.spec)))

    @jax.custom_vjp
    def to_whole(x):
        return jax.lax.with_sharding_constraint(x.astype(dtype), whole)

    def back(_, grad):
        return (jax.lax.with_sharding_constraint(grad.astype(x.dtype), sharding),)

    to_whole.defvjp(lambda x: (to_whole(x), None), back)
    return to_whole(x)


def fully_sharded(config, mesh, dtype, loss):
    """The loss of sharded parameters, and the shardings of parameters and batch."""
    shardings = train.param_shardings(nn.param_shapes(config), nn.param_axes(config), mesh)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    of_layer = jax.tree.map(lambda s: NamedSharding(mesh, P(*s.spec[1:])), shardings["layers"])
    rest = {name: s for name, s in shardings.items() if name != "layers"}
    whole = functools.partial(jax.tree.map, functools.partial(gather, dtype))

    def sharded_loss(params, tokens):
        top = whole(rest, {name: params[name] for name in rest})
        return loss(
            config,
            {**top, "layers": params["layers"]},
            tokens,
            dtype=dtype,
            options=nn.LayerOptions(
                remat="full",
                on_layer=lambda layer: whole(of_layer, layer),
                on_stream=lambda x: jax.lax.with_sharding_constraint(x, rows),
            ),
        )

    return sharded_loss, shardings, rows


@pytest.mark.slow
@pytest.mark.eight_devices
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "llama"])
def test_causal_lm_apply_on_a_mesh_has_loss_and_gradients_of_one_device(name):
    config, params, tokens = CONFIGS[name], params_of(name), tokens_of(name, 8, 12)
    expected, grads = jax.jit(jax.value_and_grad(functools.partial(next_token_loss, config)))(params, tokens)
    mesh = train.make_mesh(2, 2, 2)
    loss, shardings, rows = fully_sharded(config, mesh, jnp.float32, next_token_loss)
    step = jax.jit(
        jax.value_and_grad(loss),
        in_shardings=(shardings, rows),
        out_shardings=(NamedSharding(mesh, P()), shardings),
    )
    value, split = step(jax.device_put(params, shardings), jax.device_put(tokens, rows))
    np.testing.assert_allclose(value, expected, atol=1e-5)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)


@pytest.mark.slow
@pytest.mark.eight_devices
def test_generate_on_a_mesh_equals_one_device():
    config, params, tokens = CONFIGS["llama"], params_of("llama"), tokens_of("llama", 4, 6)
    mesh = train.make_mesh(2, 2, 2)
    _, shardings, rows = fully_sharded(config, mesh, jnp.float32, next_token_loss)
    with jax.default_matmul_precision("highest"):
        expected = nn.generate(config, params, tokens, max_new_tokens=6)
        split = nn.generate(config, jax.device_put(params, shardings), jax.device_put(tokens, rows), max_new_tokens=6)
    np.testing.assert_array_equal(split.tokens, expected.tokens)


def compiled_for_tpu(config, topology, fsdp, tensor, length):
    """Loss and gradient of one sequence for each share of the batch, compiled ahead of time."""
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    mesh = Mesh(devices.reshape(-1, fsdp, tensor), train.MESH_AXES, axis_types=(AxisType.Auto,) * 3)

    def loss(config, params, tokens, **options):
        logits = nn.causal_lm_apply(config, params, tokens, logits_dtype=jnp.float32, **options).logits[:, :-1]
        picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)

    sharded, shardings, rows = fully_sharded(config, mesh, jnp.bfloat16, loss)
    step = jax.jit(
        jax.value_and_grad(sharded),
        in_shardings=(shardings, rows),
        out_shardings=(NamedSharding(mesh, P()), shardings),
    )
    tokens = jax.ShapeDtypeStruct((devices.size // tensor, length), jnp.int32)
    return step.lower(nn.param_shapes(config), tokens).compile()


@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "tensor"), [(16, 1), (8, 2)])
def test_llama3_8b_fits_sixteen_chips_of_v5e(fsdp, tensor):
    compiled = compiled_for_tpu(nn.CausalLMConfig.llama3("8b"), "v5e:4x4", fsdp, tensor, length=2048)
    memory = compiled.memory_analysis()
    stored, results, rest = (getattr(memory, f"{x}_size_in_bytes") for x in ("argument", "output", "temp"))
    # A sixteenth of 8.03 milliard float32 numbers, but for norms, which every chip has.
    assert stored == pytest.approx(8.03e9 * 4 / 16, rel=0.01)
    print(f"\nbytes per chip: arguments {stored}, results {results}, rest {rest}")
    assert stored + results + rest < 16e9
    # No layer is ever whole but the one that runs, and the table of words is never whole on a chip that has a part.
    text = compiled.as_text()
    assert "[32,4096,14336]" not in text
    if tensor > 1:
        assert "[128256,4096]" not in text
