"""A small language model with adapters away from their start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import adapters, nn
from subspace_jax.nn.params import map_specs

CONFIG = nn.CausalLMConfig.gpt2(64, 32, 4, 4, max_length=32)
RULES = {
    "lora": {"attn/*": adapters.LoRA(4, 8.0), "re:layers/mlp/.*": adapters.LoRA(2, 2.0, rslora=True)},
    "dora": {"layers/**": adapters.DoRA(3, 6.0)},
    "tables": {"embed": adapters.LoRA(3, 3.0), "qkv": adapters.DoRA(2, 2.0)},
    "dora table": {"embed": adapters.DoRA(3, 3.0)},
    "layers differ": {
        "attn/*": adapters.LoRA((4, 1, 2, 2), (8.0, 3.0, 1.0, 2.0)),
        "mlp/*": adapters.LoRA((0, 2, 1, 0), 2.0),
    },
    "dora layers": {
        "attn/*": adapters.DoRA((4, 1, 2, 2), (8.0, 3.0, 1.0, 2.0)),
        "mlp/*": adapters.DoRA((0, 2, 1, 0), 2.0),
    },
    "svfit": {"layers/**": adapters.SVFit(8), "embed": adapters.SVFit(None, "log")},
    "svfit relu": {"attn/*": adapters.SVFit("energy", "relu", tau=0.8)},
    "pissa": {"attn/*": adapters.LoRA(4, 8.0, init="pissa"), "mlp/*": adapters.DoRA(3, 2.0, init="pissa_randomized")},
    "effort": {"attn/*": adapters.Effort(2), "embed": adapters.Effort()},
    "gaussian": {"qkv": adapters.LoRA(4, 8.0, init="gaussian")},
    "full": {"layers/**": adapters.LoRA(2, 4.0), "norm/scale": adapters.Full(), "re:.*/bias": adapters.Full()},
}


@functools.cache
def params():
    """Parameters large enough that tokens are told apart; drawn without a compiler."""
    draw = np.random.default_rng(0).standard_normal

    def value(spec):
        return spec.value + 4 * (spec.stddev or 0.0) * draw(spec.shape)

    return map_specs(lambda spec: jnp.asarray(value(spec), jnp.float32), nn.param_specs(CONFIG))


def prepare(name, key=5):
    """The frozen tree and the adapters of a case."""
    run = functools.partial(adapters.prepare, settings=RULES[name])
    # The values of the weights decide on the rank of "energy".
    return (run if name == "svfit relu" else jax.jit(run))(jax.random.key(key), params())


def tokens(*shape):
    return jax.random.randint(jax.random.key(1), shape, 0, CONFIG.vocab_size, jnp.int32)


def moved(trainable, seed=2, by=0.05):
    """Adapters away from their start."""
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda x: x + jnp.asarray(by * draw(x.shape), x.dtype), trainable)


@jax.jit
def logits(params, tokens):
    with jax.default_matmul_precision("highest"):
        return nn.causal_lm_apply(CONFIG, params, tokens).logits
