"""Three phases with labels from the host that stop by themselves; see :mod:`tests.train.proving.dsc`."""

import jax
import numpy as np
import optax
import pytest

from subspace_jax.train import loop

from . import dsc
from .runs import assert_resumes, assert_survives_kill, fit

STEPS = (20, 200, 20)


@pytest.fixture(scope="module")
def run():
    return dsc.build(STEPS)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_curves", lambda *arguments: None)
        return fit(run, tmp_path_factory.mktemp("whole"), checkpoint_every=60)


def steps_of(result):
    last = {row["phase"]: row["step"] for row in result.rows if row["split"] == "train"}
    return np.diff([0, *last.values()])


@pytest.mark.slow
def test_dsc_finds_orthogonal_subspaces_and_stops_before_its_caps(whole):
    assert whole.metrics["clusters/accuracy"] == 1.0
    _, expression, structured = steps_of(whole)
    assert 50 < expression < STEPS[1]
    # Labels that stay the same end the last phase; those of the first round differ from none.
    assert structured == 6
    rows = [row for row in whole.rows if row["split"] == "train" and row["phase"] == "expression"]
    assert rows[-1]["loss"] < rows[50]["loss"] < rows[0]["loss"]
    assert [row["phase"] for row in whole.rows if row["split"] == "clusters"] == ["expression", "structured"]


@pytest.mark.slow
def test_dsc_rests_the_encoder_in_the_last_phase(whole):
    assert set(whole.state.opt_state) == {"coef"}
    # The moments of C went on from the phase before: one count for both.
    counts = [count for _, count in optax.tree.get_all_with_path(whole.state.opt_state, "count")]
    assert set(map(int, counts)) == {sum(steps_of(whole)[1:])}


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(75,), (5, 20, 21, 33, 90)])
def test_dsc_interrupted_in_a_phase_ends_with_the_same_bits(run, whole, steps, tmp_path):
    assert_resumes(run, tmp_path, steps, whole, checkpoint_every=60)


@pytest.mark.slow
def test_dsc_interrupted_between_rounds_of_labels_ends_with_the_same_bits(run, whole, tmp_path):
    last = int(whole.state.step)
    assert_resumes(run, tmp_path, (last - 5, last - 2), whole, checkpoint_every=2)


@pytest.mark.slow
@pytest.mark.eight_devices
def test_dsc_on_eight_devices_shards_the_coefficients(whole):
    assert whole.metrics["clusters/accuracy"] == 1.0
    assert whole.state.params["coef"].sharding.spec[0] is not None


@pytest.mark.slow
@pytest.mark.eight_devices
def test_dsc_interrupted_on_eight_devices_ends_with_the_same_bits(run, whole, tmp_path):
    assert_resumes(run, tmp_path, (75,), whole, checkpoint_every=60)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_dsc_killed_in_the_second_phase_ends_with_the_same_bits(devices, tmp_path):
    assert_survives_kill("dsc", tmp_path, devices, 75)
