"""Importing the library's training is quick: what is heavy is imported where it is used."""

import json
import subprocess
import sys

HEAVY = (
    *("grain", "orbax", "tensorboardX", "tensorstore", "torch", "matplotlib", "sklearn", "scipy.stats"),
    *("tensorflow", "tensorflow_datasets", "PIL", "transformers"),
)


def test_importing_train_imports_nothing_heavy():
    code = "import json, sys, subspace_jax.train; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "subspace_jax.train.loop" in loaded
    assert not {name for name in HEAVY if name in loaded}
