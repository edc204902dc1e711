"""XFactors as a task: the contract of tasks, a run from its config, the pictures that its command draws."""

import functools

import jax
import numpy as np
import pytest

from subspace_jax import train
from subspace_jax.cli.main import main
from subspace_jax.represent import xfactors
from subspace_jax.represent.xfactors import task as xfactors_task
from tests.train.common import data_of
from tests.train.task_battery import TaskContract

LAYOUT = xfactors.SubspaceLayout(2, (2, 1))
# A temperature at which the order of sums shows less than at 0.03.
WEIGHTS = xfactors.XFactorsConfig(temperature=0.5)


def problem(network, widths, side):
    rng = np.random.default_rng(0)
    rows = {
        "inputs": rng.random((40, side, side, 1)).astype(np.float32),
        "factors": rng.integers(0, 3, (40, 3)).astype(np.int32),
    }
    make = functools.partial(
        xfactors.make_xfactors, layout=LAYOUT, image_shape=(side, side, 1), network=network, widths=widths
    )
    task = xfactors.XFactorsTask(make, (2, 0), WEIGHTS, shift=1)
    return task, data_of(rows, rows)


@pytest.mark.slow
class TestXFactors(TaskContract):
    deterministic = False

    def make(self):
        return problem("mlp", (8,), 4)


@pytest.mark.slow
class TestConvolutionalXFactors(TaskContract):
    deterministic = False

    def make(self):
        return problem("conv", (4, 4, 8), 8)


SMALL = ("train.steps=2", "model.widths=8,", "train.eval_every=2", "train.checkpoint_every=2", "data.batch_size=64")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on sprites, without scores, which take longer."""
    workdir = tmp_path_factory.mktemp("sprites") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.loop, "plot_curves", lambda *arguments: None)
        patch.setattr(xfactors_task.FactorScores, "finish", lambda self, **sets: {"sets": len(sets)})
        config = train.override(train.load_config("represent/sprites"), SMALL)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
            result = train.run(config, workdir, progress=False)
    return workdir, result


@pytest.mark.slow
def test_a_run_from_the_config_reports_errors_and_scores(trained):
    _, result = trained
    assert result.metrics.keys() == {"mse", "kl_s", "kl_t", "factors/sets"}
    assert result.metrics["factors/sets"] == 2


@pytest.mark.slow
def test_factors_writes_both_pictures_into_the_folder_of_the_run(trained, capsys):
    workdir, _ = trained
    assert main(["factors", "--workdir", str(workdir), "--rows", "2"]) == 0
    told = capsys.readouterr().out
    for path in (workdir / "swaps.png", workdir / "generated.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert str(path) in told


@pytest.mark.slow
def test_factors_writes_one_picture_of_chosen_values_where_it_is_told_to(trained, tmp_path):
    chosen = ["--generate", "shape=cross", "--generate", "shape=square", "--generate", "x=0"]
    assert main(["factors", "--workdir", str(trained[0]), *chosen, "--out", str(tmp_path / "out.png")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.slow
def test_swapped_changes_one_factor_and_the_rest_separately(trained):
    found = xfactors.open_trained(trained[0])
    assert found.targets == ("shape", "x", "y")
    codes = found.codes(found.test_set["inputs"][:4])
    other = type(codes)(*(x[::-1] for x in codes))
    pictures = {name: found.swapped(codes, other, name) for name in (*found.targets, "rest")}
    assert all(picture.shape == (4, 16, 16, 1) for picture in pictures.values())
    assert len({picture.tobytes() for picture in pictures.values()}) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--swap", "color"], "factor: expected one of ('shape', 'x', 'y', 'rest'), got 'color'"),
        (["--generate", "shape"], "--generate: expected FACTOR=VALUE, got shape"),
        (["--generate", "color=red"], "factor: expected one of ('shape', 'x', 'y'), got 'color'"),
        (["--generate", "shape=star"], "shape: expected one of ('square', 'outline', 'cross'), got 'star'"),
        (["--out", "x.png"], "--out: expected --swap or --generate"),
        (["--rows", "0", "--swap", "x"], "rows: expected at least 1, got 0"),
        (["--rows", "1000", "--swap", "x"], "rows, columns: expected"),
    ],
)
def test_factors_refuses_what_is_unknown(trained, capsys, arguments, message):
    assert main(["factors", "--workdir", str(trained[0]), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.name=shapes", "data.name: expected one of"),
        ("data.targets=('shape','x')", "data.targets: expected a factor for each of model.factor_dims"),
        ("data.targets=('shape','x','z')", "data.targets: expected factors of"),
        ("data.test_share=0.0", "data.test_share: expected a share"),
        ("data.shift=-1", "data.shift: expected 0 to"),
        ("model.factor_dims=(2,0,2)", "model.residual_dim, factor_dims: expected"),
        ("model.network=vit", "model.network: expected"),
        ("loss.temperature=0.0", "loss.temperature: expected a positive number"),
        ("loss.nce_weight=-1.0", "loss.nce_weight: expected at least 0"),
    ],
)
def test_build_names_the_field_that_can_not_serve(setting, message):
    config = train.override(train.load_config("represent/sprites"), [setting])
    with pytest.raises(ValueError, match=message):
        train.build(config)


@pytest.mark.slow
def test_the_openmoji_config_builds_a_run_on_its_pictures():
    (phase,) = train.build(train.load_config("represent/openmoji")).phases
    assert phase.data.batch["inputs"].shape == (64, 32, 32, 3)
    assert phase.task.factor_names == ("concept", "gender", "tone")


def test_targets_that_do_not_fit_the_layout_are_refused():
    make = functools.partial(xfactors.make_xfactors, layout=LAYOUT, image_shape=(4, 4, 1), network="mlp", widths=(8,))
    with pytest.raises(ValueError, match="targets: expected one factor for each of the blocks"):
        xfactors.XFactorsTask(make, (0,), xfactors.XFactorsConfig())
