import itertools
import time

import chex
import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_jax import data


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def seen(batches):
    return np.concatenate([batch["labels"] for batch in batches])


def test_batches_have_the_fields_of_the_source(digit_arrays):
    batch = next(data.train_batches(digit_arrays, batch_size=64, seed=0))
    assert (batch["inputs"].shape, batch["inputs"].dtype) == ((64, 8, 8, 1), np.float32)
    assert (batch["labels"].shape, batch["labels"].dtype) == ((64,), np.int32)
    assert batch["inputs"].max() == 1


def test_rows_stay_with_their_labels(numbered):
    for batch in take(data.train_batches(numbered(30), batch_size=7, seed=5), 9):
        np.testing.assert_array_equal(batch["inputs"][:, 0], batch["labels"])


def test_arrays_and_files_give_the_same_batches(digits, digit_arrays):
    left = take(data.train_batches(digits, batch_size=50, seed=3), 3)
    chex.assert_trees_all_equal(left, take(data.train_batches(digit_arrays, batch_size=50, seed=3), 3))


def test_a_source_without_batched_reads_will_do(numbered):
    arrays = numbered(12)
    rows = [{name: values[i] for name, values in arrays.items()} for i in range(12)]
    left = take(data.train_batches(rows, batch_size=4, seed=1), 5)
    chex.assert_trees_all_equal(left, take(data.train_batches(arrays, batch_size=4, seed=1), 5))


def test_one_seed_gives_one_order_and_two_give_two(numbered):
    first, again, other = (seen(take(data.train_batches(numbered(100), batch_size=10, seed=s), 20)) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_epoch_of_one_seed_is_an_epoch_of_the_next(numbered, seed):
    epochs = {tuple(seen(take(data.train_batches(numbered(8), batch_size=8, seed=s), 1))) for s in (seed, seed + 1)}
    assert len(epochs) == 2


def test_every_epoch_is_a_new_permutation(numbered):
    batches = take(data.train_batches(numbered(60), batch_size=10, seed=0), 18)
    epochs = seen(batches).reshape(3, 60)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(60))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_what_an_epoch_has_over_is_left_out(numbered):
    batches = list(data.train_batches(numbered(25), batch_size=10, seed=0, num_epochs=3))
    assert data.steps_per_epoch(25, 10) == 2
    assert len(batches) == 6
    for epoch in seen(batches).reshape(3, 20):
        assert len(set(epoch)) == 20


def test_every_example_comes_first_about_equally_often(numbered):
    epochs = seen(data.train_batches(numbered(20), batch_size=20, seed=0, num_epochs=2000)).reshape(2000, 20)
    counts = np.stack([np.bincount(column, minlength=20) for column in epochs.T])
    chi_square = ((counts - 100) ** 2 / 100).sum()  # 361 degrees of freedom
    assert abs(chi_square - 361) < 4 * np.sqrt(2 * 361)


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_share_the_very_batch_of_one_process(numbered, process_count):
    source = numbered(53)
    whole = take(data.train_batches(source, batch_size=8, seed=4, process=(0, 1)), 14)
    shards = [
        take(data.train_batches(source, batch_size=8, seed=4, process=(p, process_count)), 14)
        for p in range(process_count)
    ]
    assert all(len(batch["labels"]) == 8 // process_count for shard in shards for batch in shard)
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in whole[0]} for step in zip(*shards, strict=True)
    ]
    chex.assert_trees_all_equal(joined, whole)
    epoch = [set(seen(shard[:6])) for shard in shards]
    assert sum(map(len, epoch)) == len(set.union(*epoch)) == 48


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("count", [3, 40, 53])
def test_evaluation_sees_every_example_once_in_order(numbered, count, process_count):
    shards = [
        list(data.eval_batches(numbered(count), batch_size=8, process=(p, process_count))) for p in range(process_count)
    ]
    assert {len(shard) for shard in shards} == {-(-count // 8)}
    rows, mask = [], []
    for step in zip(*shards, strict=True):
        for batch in step:
            assert batch["inputs"].shape == (8 // process_count, 1)
            assert batch["mask"].dtype == np.float32
            rows.extend(batch["labels"])
            mask.extend(batch["mask"])
    assert sum(mask) == count
    np.testing.assert_array_equal(rows[:count], np.arange(count))
    assert not np.any(rows[count:])


def test_evaluation_reads_files_like_arrays(tfds_dir):
    source = data.image_source("tiny_rgb", "test", tfds_dir)
    left = list(data.eval_batches(source, batch_size=4))
    assert [batch["mask"].tolist() for batch in left] == [[1, 1, 1, 1], [1, 1, 1, 0]]
    chex.assert_trees_all_equal(left, list(data.eval_batches(data.load_arrays(source), batch_size=4)))


@settings(max_examples=12, deadline=None)
@given(stop=st.integers(0, 40), extra=st.integers(0, 3))
def test_resumed_batches_are_the_same_bits_wherever_it_stops(stop, extra):
    source = {"inputs": np.arange(70, dtype=np.float32)[:, None], "labels": np.arange(70, dtype=np.int32)}

    def make():
        return data.train_batches(source, batch_size=9, seed=2, transform=jitter)  # 7 steps an epoch

    straight = take(make(), stop + 10)
    first = make()
    take(first, stop)
    state = first.get_state()
    take(first, extra)
    assert state == {"next_index": stop}
    second = make()
    second.set_state(state)
    chex.assert_trees_all_equal(take(second, 10), straight[stop:])
    first.set_state(state)
    chex.assert_trees_all_equal(take(first, 10), straight[stop:])


def jitter(example, rng):
    return {**example, "inputs": example["inputs"] + rng.standard_normal(1, dtype=np.float32)}


@pytest.mark.parametrize("stop", [5, 18, 23])
def test_orbax_checkpoint_resumes_the_same_bits(digit_arrays, tmp_path, stop):
    def make():
        return data.train_batches(digit_arrays, batch_size=64, seed=7)  # 18 steps an epoch

    straight = take(make(), stop + 20)
    first = make()
    take(first, stop)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(stop, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(first)))
        take(first, 1)
    second = make()
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.restore(stop, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(second)))
    chex.assert_trees_all_equal(take(second, 20), straight[stop:])


def test_transform_does_not_depend_on_the_number_of_processes(numbered):
    whole = take(data.train_batches(numbered(30), batch_size=6, seed=0, transform=jitter), 12)
    halves = [
        take(
            data.train_batches(numbered(30), batch_size=6, seed=0, transform=jitter, process=(p, 2)),
            12,
        )
        for p in range(2)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in whole[0]} for step in zip(*halves, strict=True)
    ]
    chex.assert_trees_all_equal(joined, whole)
    noise = np.concatenate([batch["inputs"][:, 0] - batch["labels"] for batch in whole])
    assert len(set(np.round(noise, 3))) > 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size: expected an integer of at least 1, got 2.0"),
        ({"batch_size": 11}, "batch_size: expected at most the 10 examples"),
        ({"batch_size": 5, "process": (0, 2)}, "batch_size: .* multiple of 2 processes, got 5"),
        ({"batch_size": 4, "process": (2, 2)}, "process: expected an index from 0 to 1, got 2"),
        ({"batch_size": 4, "seed": -1}, "seed: expected at least 0, got -1"),
        ({"batch_size": 4, "num_epochs": 0}, "num_epochs: expected at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(numbered, arguments, message):
    with pytest.raises(ValueError, match=message):
        data.train_batches(numbered(10), **{"seed": 0, **arguments})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"inputs": np.zeros((4, 2)), "labels": np.zeros(3)}, "one length, got {'inputs': 4, 'labels': 3}"),
        ([], "at least one example"),
        ({}, "at least one example"),
    ],
)
def test_empty_sources_and_fields_of_different_lengths_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        data.train_batches(source, batch_size=1, seed=0)
    with pytest.raises(ValueError, match=message):
        data.eval_batches(source, batch_size=1)


@pytest.mark.parametrize("as_arrays", [True, False])
def test_batches_need_no_labels(as_arrays):
    points = np.arange(20, dtype=np.float32).reshape(10, 2)
    source = {"points": points} if as_arrays else [{"points": x} for x in points]
    batch = next(data.train_batches(source, batch_size=4, seed=0, transform=lambda x, rng: x))
    assert {name: x.shape for name, x in batch.items()} == {"points": (4, 2)}
    last = list(data.eval_batches(source, batch_size=4))[-1]
    np.testing.assert_array_equal(last["points"][:2], points[8:])
    np.testing.assert_array_equal(last["mask"], [1, 1, 0, 0])


class Slow:
    """Examples that take random times, so that the threads that read ahead overtake each other."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        time.sleep(np.random.default_rng(index).uniform(0, 2e-3))
        return {"inputs": np.full(1, index, np.float32), "labels": np.int32(index)}


@pytest.mark.parametrize("stop", [1, 4, 13])
def test_threads_that_read_ahead_change_neither_order_nor_resumption(numbered, monkeypatch, stop):
    monkeypatch.setattr("os.cpu_count", lambda: 8)

    def make():
        return data.train_batches(Slow(), batch_size=9, seed=3, transform=jitter)  # 4 steps an epoch

    straight = take(data.train_batches(numbered(40), batch_size=9, seed=3, transform=jitter), stop + 8)
    first = make()
    chex.assert_trees_all_equal(take(first, stop), straight[:stop])
    assert first.get_state() == {"next_index": stop}  # not what the threads have read
    second = make()
    second.set_state(first.get_state())
    chex.assert_trees_all_equal(take(second, 8), straight[stop:])


def test_eval_passes_call_the_size_by_its_name_before_a_pass_begins(numbered):
    passes = data.eval_passes(numbered(5), 4)
    assert [batch["mask"].sum() for begin in range(2) for batch in passes()] == [4, 1, 4, 1]
    with pytest.raises(ValueError, match="eval_batch_size: expected an integer of at least 1, got 0"):
        data.eval_passes(numbered(5), 0)
