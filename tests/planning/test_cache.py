"""The cache of plans: what its key depends on, and files that it does not trust."""

import json
import os
from pathlib import Path

import pytest

from subspace_jax import planning, train
from subspace_jax.planning import cache
from tests.planning import phases
from tests.planning.test_report import PLAN


def config_of(**fields):
    config = train.default_config()
    config.task = "tests.planning.phases"
    return train.override(config, [f"{name}={value}" for name, value in fields.items()])


@pytest.fixture(scope="module")
def key():
    return planning.plan_key(config_of(), "h100:4")


def file_of(cache_home):
    (file,) = (cache_home / "subspace_jax" / "plans").iterdir()
    return file


def test_read_plans_gives_what_write_plans_wrote(key):
    assert planning.read_plans(key) is None
    refused = planning.Plan(**{**vars(PLAN), "time": None, "collectives": None, "largest": (), "refusal": "too large"})
    planning.write_plans(key, [PLAN, refused])
    assert planning.read_plans(key) == [PLAN, refused]
    assert planning.read_plans(key | {"topology": "h100:8"}) is None


def test_plan_key_depends_on_config_mesh_topology_and_environment(key, monkeypatch):
    assert planning.plan_key(config_of(), "h100:4", {"data": 4}) == key  # the mesh of the config
    keys = [
        planning.plan_key(config_of(seed=3), "h100:4"),
        planning.plan_key(config_of(), "h100:8"),
        planning.plan_key(config_of(), "h100:4", {"fsdp": 2}),
        planning.plan_key(config_of(), "h100:4", evaluations=False),
    ]
    monkeypatch.setenv("XLA_FLAGS", "--xla_other")
    keys.append(planning.plan_key(config_of(), "h100:4"))
    assert all(other != key for other in keys)
    assert set(key["versions"]) == {"subspace-jax", "jax", "jaxlib", "libtpu"}


def test_plan_key_depends_on_the_config_of_a_model_folder_and_not_on_its_weights(tmp_path):
    state, folder = cache._path_state, tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    before = state(folder)
    (folder / "model.safetensors").write_text("weights")
    assert state(folder) == before
    (folder / "config.json").write_text('{"hidden_size": 8}')
    assert state(folder) != before


def test_plan_key_depends_on_the_classes_of_a_folder_of_images(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    os.utime(tmp_path / "train", (1, 1))
    before = cache._path_state(tmp_path)
    (tmp_path / "train" / "dog").mkdir()
    assert cache._path_state(tmp_path) != before


def test_plan_key_depends_on_the_source_files_of_the_library_and_of_an_own_task(tmp_path):
    library = cache._source_files("subspace_jax.language.finetune")
    assert {Path(cache.__file__), Path(train.__file__)} <= set(library)
    assert set(cache._source_files("tests.planning.phases")) > {*library, Path(phases.__file__)}
    assert Path(phases.__file__) not in library
    source = tmp_path / "task.py"
    source.write_text("a = 1")
    before = cache._digest([source])
    (tmp_path / ".#task.py").symlink_to(tmp_path / "nowhere")
    assert cache._digest([source, tmp_path / ".#task.py"]) == before
    source.write_text("a = 2")
    assert cache._digest([source]) != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"examples": 8', '"examples": 9'),
        lambda text: json.dumps([1, 2]),
        lambda text: json.dumps(json.loads(text) | {"key": "of something else"}),
        lambda text: "\udcff",
    ],
)
def test_read_plans_ignores_a_damaged_or_foreign_file(damage, key, cache_home):
    planning.write_plans(key, [PLAN])
    file = file_of(cache_home)
    file.write_bytes(damage(file.read_text()).encode(errors="surrogateescape"))
    assert planning.read_plans(key) is None
    planning.write_plans(key, [PLAN])
    assert planning.read_plans(key) == [PLAN]


def test_write_plans_warns_where_the_folder_can_not_be_made(key, cache_home, caplog):
    cache_home.write_text("a file")
    planning.write_plans(key, [PLAN])
    assert "the plan is not cached" in caplog.text
    assert planning.read_plans(key) is None
