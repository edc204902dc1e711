"""Five hundred mutated configs: each is refused in one line before anything runs, or has values of the right types."""

import copy
import json

import numpy as np
import pytest

from subspace_jax import train

from .mutations import bounded, mutate_fields, refusal, write_json

pytestmark = pytest.mark.slow

# Those whose data and models are there without downloads.
CONFIGS = (
    "adapters/fake_digits.py", "adapters/rotated_digits.py", "gcr/digits.py:k8", "gcr/digits_resnet.py:k8",
    "gcr/synthetic.py", "lm/tiny.py", "optim/intrinsic_digits.py", "optim/low_rank_regression.py", "optim/tiny_gpt.py",
)  # fmt: skip


def at(tree, path):
    for part in path:
        tree = tree[part]
    return tree


def is_like(old, new):
    """Whether a value may stand where another stood: a whole number where a float is, a list for a tuple."""
    if old is None or new is None or isinstance(old, dict):
        return True
    if isinstance(old, float):
        return isinstance(new, float) or type(new) is int
    return type(new) is type(old) or (isinstance(old, list) and isinstance(new, list))


@pytest.mark.parametrize("spec", CONFIGS)
def test_build_of_mutated_configs_refuses_in_one_line_or_takes_values_of_the_right_type(
    spec, configs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # some values name a folder that is made
    rng = np.random.default_rng(sum(map(ord, spec)))
    original = json.loads(json.dumps(train.load_config(f"{configs}/{spec}").to_dict()))
    wrong, accepted = [], 0
    for number in range(56):
        fields, what = mutate_fields(rng, copy.deepcopy(original))
        file = tmp_path / "config.json"
        write_json(file, fields)
        try:
            with bounded():
                train.build(train.read_config(file))
        except AssertionError as error:
            wrong.append(f"{number} ({what}): {error}")
            continue
        except Exception as error:
            if fault := refusal(error):
                wrong.append(f"{number} ({what}): {fault}")
            continue
        accepted += 1
        path = what.split(" = ")[0].split(".")
        if " = " in what and not is_like(at(original, path), at(fields, path)):
            wrong.append(f"{number} ({what}): taken where {at(original, path)!r} stood")
    assert not wrong, "\n".join(wrong)
    assert accepted < 50
