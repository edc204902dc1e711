"""Streams of tasks: how they are made, what is refused, and the data of their phases."""

import numpy as np
import pytest

from subspace_jax.continual import stream as streams


def labeled(count=12, classes=4, seed=0, shape=(3,)):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((count, *shape)).astype(np.float32)
    return {"inputs": inputs, "labels": (np.arange(count) % classes).astype(np.int32)}


def with_labels(examples):
    return examples, examples["labels"]


def of_two_tasks(**changes):
    stream = streams.permuted(labeled(), labeled(8, seed=1), 2)
    return streams.make_stream([stream.tasks[0], stream.tasks[1]._replace(**changes)])


def test_permuted_keeps_the_first_task_and_permutes_others_in_the_same_way_for_both_splits():
    learn, test = labeled(shape=(2, 2)), labeled(8, seed=1, shape=(2, 2))
    stream = streams.permuted(learn, test, 3, seed=5)
    np.testing.assert_array_equal(stream.tasks[0].train["inputs"], learn["inputs"].reshape(12, 4))
    order = np.random.default_rng(5).permutation(4)
    for split, whole in (("train", learn), ("test", test)):
        inputs = getattr(stream.tasks[1], split)["inputs"]
        np.testing.assert_array_equal(inputs, whole["inputs"].reshape(-1, 4)[:, order])
    assert stream.num_classes == (4, 4, 4)
    assert stream.fingerprint == streams.permuted(learn, test, 3, seed=5).fingerprint
    assert stream.fingerprint != streams.permuted(learn, test, 3, seed=6).fingerprint


def test_rotated_turns_images_and_leaves_those_of_0_degrees():
    images = {"inputs": np.arange(8, dtype=np.float32).reshape(2, 2, 2, 1), "labels": np.zeros(2, np.int32)}
    stream = streams.rotated(images, images, [0, 180])
    np.testing.assert_array_equal(stream.tasks[0].train["inputs"], images["inputs"])
    np.testing.assert_allclose(stream.tasks[1].train["inputs"], images["inputs"][:, ::-1, ::-1], atol=1e-6)
    with pytest.raises(ValueError, match="expected images"):
        streams.rotated(labeled(), labeled(), [0])


def test_split_classes_counts_labels_from_0_in_every_task():
    learn, test = labeled(), labeled(8, seed=1)
    stream = streams.split_classes(with_labels(learn), with_labels(test), [(3, 0), (1, 2)])
    first = stream.tasks[0].train
    np.testing.assert_array_equal(first["inputs"], learn["inputs"][np.isin(learn["labels"], (3, 0))])
    assert set(first["labels"].tolist()) == {0, 1}
    assert stream.num_classes == (2, 2)
    assert [task.classes for task in stream.tasks] == [(3, 0), (1, 2)]


def test_split_classes_of_a_source_gives_the_examples_of_arrays():
    class Source:
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return {name: x[index] for name, x in labeled().items()}

    groups = [(3, 0), (1, 2)]
    arrays = streams.split_classes(with_labels(labeled()), with_labels(labeled()), groups)
    lazy = streams.split_classes((Source(), labeled()["labels"]), (Source(), labeled()["labels"]), groups)
    got = lazy.tasks[1].train
    assert len(got) == 6
    for i in range(6):
        np.testing.assert_array_equal(got[i]["inputs"], arrays.tasks[1].train["inputs"][i])
        assert got[i]["labels"] == arrays.tasks[1].train["labels"][i]
    joined = streams.examples_of([task.train for task in lazy.tasks], [0, 1])
    assert [int(joined[i]["task"]) for i in (0, 5, 6, 11)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([(0, 1), (1, 2)], "class 1 is in tasks 0 and 1"),
        ([(0, 1), ()], "none in task 1"),
        ([(0, 1), (7,)], "expected classes of the training set, got .7."),
    ],
)
def test_split_classes_refuses_overlapping_empty_and_unknown_groups(groups, message):
    with pytest.raises(ValueError, match=message):
        streams.split_classes(with_labels(labeled()), with_labels(labeled()), groups)


def test_split_classes_refuses_a_task_without_test_examples():
    test = {name: x[:3] for name, x in labeled().items()}
    with pytest.raises(ValueError, match="classes 3: test: expected at least one example"):
        streams.split_classes(with_labels(labeled()), with_labels(test), [(0, 1), (3,), (2,)])


def test_class_groups_are_in_order_or_drawn_and_of_equal_size():
    assert streams.class_groups(6, 3) == [(0, 1), (2, 3), (4, 5)]
    drawn = streams.class_groups(6, 3, seed=1)
    assert sorted(sum(drawn, ())) == list(range(6))
    assert drawn != streams.class_groups(6, 3)
    with pytest.raises(ValueError, match="divides 6 classes, got 4"):
        streams.class_groups(6, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "permutation 0"}, "names that differ"),
        ({"train": {name: x[:0] for name, x in labeled().items()}}, "at least one example"),
        ({"test": labeled(shape=(4,))}, "examples of one form"),
        ({"test": {**labeled(), "labels": np.full(12, -2, np.int32)}}, "labels of at least 0"),
        ({"train": {**labeled(), "inputs": np.full((12, 3), np.nan)}}, "finite inputs"),
        ({"train": {"inputs": np.ones((3, 3)), "labels": np.zeros(2)}}, "as many examples"),
        ({"classes": (5, 6)}, "labels from 0 to 1"),
    ],
)
def test_make_stream_refuses_tasks_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        of_two_tasks(**changes)


def test_make_stream_refuses_no_tasks():
    with pytest.raises(ValueError, match="at least one TaskData"):
        streams.make_stream([])


def test_unknown_tasks_are_refused_and_known_ones_ordered():
    stream = of_two_tasks()
    assert stream.index("permutation 1") == 1
    assert [task.name for task in stream.ordered([1, "permutation 0"]).tasks] == ["permutation 1", "permutation 0"]
    with pytest.raises(ValueError, match="did you mean 'permutation 1'"):
        stream.index("permutatoin 1")
    for bad in (2, -1, True, 1.0):
        with pytest.raises(ValueError, match="a position from 0 to 1"):
            stream.index(bad)
    with pytest.raises(ValueError, match="more than once"):
        stream.ordered([0, 0])


def test_task_data_trains_one_task_and_evaluates_all():
    stream = of_two_tasks()
    spec = streams.task_data(stream, [1], batch_size=4, eval_batch_size=16)
    batch = next(spec.train(0))
    assert set(batch["task"].tolist()) == {1}
    assert spec.steps_per_epoch == 3
    (whole,) = spec.evaluate["eval"]()
    assert whole["task"].tolist() == [0] * 8 + [1] * 8
    np.testing.assert_array_equal(whole["inputs"][8:], stream.tasks[1].test["inputs"])


def test_task_data_with_replay_adds_as_many_examples_of_it():
    stream = of_two_tasks()
    old = streams.examples_of([stream.tasks[0].train], [0])
    spec = streams.task_data(stream, [1], batch_size=4, replay=old)
    assert spec.batch["inputs"].shape == (8, 3)
    assert next(spec.train(0))["task"].tolist() == [1] * 4 + [0] * 4


def test_a_position_is_taken_up_exactly_and_that_of_another_stream_refused():
    stream = of_two_tasks()
    old = streams.examples_of([stream.tasks[0].train], [0])

    def open_data(of):
        return streams.task_data(of, [1], batch_size=4, replay=old).train(3)

    batches = open_data(stream)
    for _ in range(4):
        next(batches)
    position, expected = batches.get_state(), next(batches)
    again = open_data(stream)
    again.set_state(position)
    np.testing.assert_array_equal(next(again)["inputs"], expected["inputs"])
    changed = of_two_tasks(test=labeled(8, seed=2))
    with pytest.raises(ValueError, match="stream: the run began with other tasks"):
        open_data(changed).set_state(position)


def test_teacher_streams_are_sums_of_three_atoms():
    teachers = streams.teacher_tasks(1)
    stream = streams.teacher_stream(teachers, num_train=6, num_test=4)
    assert len(stream) == 6
    np.testing.assert_allclose(teachers.kernels[2], (teachers.atoms[0] + teachers.atoms[1]) / 2, atol=1e-6)
    task = stream.tasks[5].train
    np.testing.assert_allclose(task["inputs"] @ teachers.kernels[5], task["targets"], rtol=1e-5, atol=1e-5)
    assert np.linalg.matrix_rank(teachers.atoms[0]) == 2


def fields(**changes):
    found = streams.default_data()
    found.update(changes)
    return found


def array_file(folder, **changes):
    arrays = {"inputs": labeled()["inputs"], "labels": labeled()["labels"]}
    arrays |= {"test_inputs": arrays["inputs"], "test_labels": arrays["labels"], **changes}
    np.savez(folder / "set.npz", **{name: x for name, x in arrays.items() if x is not None})
    return {"name": "arrays", "data_dir": str(folder / "set.npz"), "kind": "split", "tasks": 2, "seed": -1}


def test_load_stream_reads_arrays_and_orders_tasks(tmp_path):
    named = array_file(tmp_path)
    assert streams.load_stream(fields(**named)).num_classes == (2, 2)
    ordered = streams.load_stream(fields(**named, order=(1, 0)))
    assert [task.classes for task in ordered.tasks] == [(2, 3), (0, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "shuffled"}, "data.kind"),
        ({"tasks": 0}, "data.tasks"),
        ({"tasks": 3}, "data: num_tasks: expected a number that divides 4 classes"),
        ({"order": (0, 5)}, "data: task: expected a name or a position"),
        ({"seed": -2}, "data.seed"),
        ({"name": "folder", "data_dir": "none"}, "no such folder"),
    ],
)
def test_load_stream_refuses_fields_that_cannot_serve(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        streams.load_stream(fields(**{**array_file(tmp_path), **changes}))


def test_load_stream_refuses_files_that_hold_no_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected an NPZ"):
        streams.load_stream(fields(name="arrays", data_dir=str(tmp_path / "none.npz")))
    np.save(tmp_path / "one.npy", np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"data: .*one.npy: expected an NPZ with arrays \('inputs'"):
        streams.load_stream(fields(name="arrays", data_dir=str(tmp_path / "one.npy")))
    with pytest.raises(ValueError, match=r"got no \['test_labels'\]"):
        streams.load_stream(fields(**array_file(tmp_path, test_labels=None)))
    with pytest.raises(ValueError, match="expected integers as labels"):
        streams.load_stream(fields(**array_file(tmp_path, labels=np.ones(12))))
