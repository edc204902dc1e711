"""Every optimizer of configs/optim/tiny_e2e.py takes steps on a tiny model."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from subspace_jax import interop, nn, train
from subspace_jax.language import finetune

CONFIG = Path(__file__).parents[2] / "configs" / "optim" / "tiny_e2e.py"
VARIANTS = tuple(runpy.run_path(str(CONFIG))["RATES"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("e2e") / "model"
    config = train.load_config(f"{CONFIG}:adamw")
    model, _ = finetune.model_of(config)
    interop.save_causal_lm(folder, model, nn.init_params(jax.random.key(0), model))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_takes_two_steps(folder, tmp_path, variant):
    config = train.load_config(f"{CONFIG}:{variant}")
    config.model.folder = str(folder)
    config.data.length, config.data.eval_batch_size = 64, 256
    config.optim.warmup_steps = 0
    config.train.steps = config.train.eval_every = config.train.checkpoint_every = 2
    with jax.numpy_dtype_promotion("standard"):  # which Optax's Adam needs
        assert np.isfinite(train.run(config, tmp_path, progress=False).metrics["loss"])


def test_variants_have_three_learning_rates_and_others_are_refused():
    rates = runpy.run_path(str(CONFIG))["RATES"]
    assert all(len(three) == 3 and sorted(three) == list(three) for three in rates.values())
    stats = {train.load_config(f"{CONFIG}:{name}").optim.kwargs.get("stats") for name in VARIANTS}
    assert stats == {None, "full", "projected"}
    with pytest.raises(ValueError, match="sgd"):
        train.load_config(f"{CONFIG}:sgd")
