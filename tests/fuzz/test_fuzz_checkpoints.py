"""A hundred damaged checkpoints: each is noticed, or gives the very bits that were saved."""

import json
import logging
import pathlib
import shutil

import jax
import numpy as np
import pytest

from examples import low_rank_regression
from subspace_jax import train

from .mutations import VALUES, bounded, damage_bytes, refusal

pytestmark = [
    pytest.mark.slow,
    # The readers of Orbax leave tasks behind where a file turns out to be damaged.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SETTINGS = (
    "optim.name=sgd",
    "optim.schedule=constant",
    "train.eval_every=10",
    "train.checkpoint_every=10",
    "train.keep=10",
)
STEPS = (15, 20)  # the newest two of a run that also saves between evaluations


def config_of(num_steps):
    config = low_rank_regression.default_config()
    with config.unlocked():
        config.optim.kwargs = {}  # those of another optimizer
    return train.override(config, [*SETTINGS, f"train.steps={num_steps}"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of twenty steps: its folder, what restores a state, and the states of its checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    config = config_of(20)
    train.run(config, folder, progress=False)
    run = train.build(config)
    (phase,) = run.phases
    expected = train.state_shardings(phase.task, phase.tx, run.mesh)

    def read(where, step=None):
        checkpoints = train.Checkpoints(where / "checkpoints", read_only=True)
        batches = phase.data.train(0)

        def take(state, record):
            batches.set_state(record.data)

        try:
            found = checkpoints.restore(lambda record: expected, take=take, step=step)
        finally:
            checkpoints.close()
        return None if found is None else (jax.device_get(found[0]), batches.get_state())

    return folder, read, {step: read(folder, step) for step in STEPS}


def spoil(rng, checkpoint, other):
    """Damages one file of a checkpoint; returns what was done."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file())
    file = files[rng.integers(len(files))]
    kind = rng.integers(6)
    name = file.relative_to(checkpoint)
    if kind == 0:
        file.unlink()
        return f"{name} removed"
    if kind == 1:
        twin = other / name
        if twin.is_file():
            shutil.copyfile(twin, file)
            return f"{name} of the other checkpoint"
    if kind == 2 and (file.suffix == ".json" or file.name in ("metrics", "_METADATA")):
        value = VALUES[rng.integers(len(VALUES))]
        file.write_text(json.dumps(value))
        return f"{name} holds {str(value)[:40]!r}"
    if kind == 3:
        folder = file.parent
        shutil.rmtree(folder)
        return f"{folder.relative_to(checkpoint)}/ removed"
    file.write_bytes(damage_bytes(rng, file.read_bytes()))
    return f"{name} damaged"


def same(found, expected):
    leaves = jax.tree.leaves(found), jax.tree.leaves(expected)
    return len(leaves[0]) == len(leaves[1]) and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(*leaves, strict=True)
    )


def test_restore_of_100_damaged_checkpoints_gives_saved_bits_or_an_error_that_names_the_folder(saved, tmp_path):
    source, read, states = saved
    rng, wrong, noticed = np.random.default_rng(0), [], 0
    logging.disable(logging.WARNING)
    try:
        for number in range(100):
            where = tmp_path / str(number)
            shutil.copytree(source, where)
            newest, older = (where / "checkpoints" / str(step) for step in reversed(STEPS))
            what = spoil(rng, newest, older)
            there = sorted(p.relative_to(where) for p in where.rglob("*"))
            try:
                with bounded():
                    found = read(where)
            except Exception as error:
                if fault := refusal(error):
                    wrong.append(f"{number} ({what}): {fault}")
                continue
            step = None if found is None else int(found[0].step)
            if step not in states or not same(found, states[step]):
                wrong.append(f"{number} ({what}): silently another state, of step {step}")
            noticed += step != STEPS[-1]
            if sorted(p.relative_to(where) for p in where.rglob("*")) != there:
                wrong.append(f"{number} ({what}): a reader changed the folder")
            shutil.rmtree(where)
    finally:
        logging.disable(logging.NOTSET)
    assert not wrong, "\n".join(wrong)
    assert noticed > 50, f"only {noticed} of 100 damages were noticed"


def test_run_resumed_from_a_damaged_checkpoint_ends_with_the_bits_of_an_uninterrupted_run(saved, tmp_path):
    source, _, _ = saved
    config = config_of(30)
    shutil.copytree(source, tmp_path / "whole")
    expected = jax.device_get(train.run(config, tmp_path / "whole", progress=False).state)
    rng, wrong = np.random.default_rng(1), []
    logging.disable(logging.WARNING)
    try:
        for number in range(12):
            where = tmp_path / str(number)
            shutil.copytree(source, where)
            newest, older = (pathlib.Path(where) / "checkpoints" / str(step) for step in reversed(STEPS))
            what = spoil(rng, newest, older)
            try:
                with bounded():
                    state = jax.device_get(train.run(config, where, progress=False).state)
            except Exception as error:
                if fault := refusal(error):
                    wrong.append(f"{number} ({what}): {fault}")
                continue
            if not same(state, expected):
                wrong.append(f"{number} ({what}): ended with other bits")
    finally:
        logging.disable(logging.NOTSET)
    assert not wrong, "\n".join(wrong)
