import json

import pytest
from ml_collections import ConfigDict

from subspace_jax import train
from subspace_jax.represent import classify


@pytest.fixture
def config():
    return classify.default_config()


@pytest.fixture
def write(tmp_path):
    """Writes a config file whose ``get_config`` has these lines, and returns its path."""

    def make(*lines, signature="", name="some.py"):
        body = "\n".join(f"    {line}" for line in ("config = classify.default_config()", *lines, "return config"))
        path = tmp_path / name
        path.write_text(f"from subspace_jax.represent import classify\n\ndef get_config({signature}):\n{body}\n")
        return str(path)

    return make


def test_settings_take_the_type_of_the_field(config):
    settings = ["optim.learning_rate=1", "train.steps=7", "data.augment=True", "data.name=True", "model.features=(3,4)"]
    changed = train.override(config, settings)
    assert changed.optim.learning_rate == 1.0
    assert type(changed.optim.learning_rate) is float
    assert (changed.train.steps, changed.data.augment, changed.data.name) == (7, True, "True")
    assert changed.model.features == (3, 4)
    assert config.train.steps == 0  # the config itself is as it was


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.learning_rat=1", "--config.optim.learning_rat: unknown field; did you mean optim.learning_rate?"),
        ("train.stps=1", "--config.train.stps: unknown field; did you mean train.steps?"),
        ("optim.grasmann.name=rsgd", "unknown field; did you mean optim.grassmann.name?"),
        ("lerning_rate=1", "unknown field; did you mean optim.learning_rate?"),
        ("mesh=8", "unknown field; it is a group; set one of mesh.data, mesh.fsdp, mesh.sequence, mesh.tensor"),
        ("train.steps", "--config.train.steps: expected --config.train.steps=VALUE"),
        ("train.steps=many", "--config.train.steps: expected int such as 0, got 'many'"),
        ("train.steps=1.5", "--config.train.steps: expected int such as 0, got '1.5'"),
        ("train.steps=True", "--config.train.steps: expected int such as 0, got 'True'"),
        ("optim.learning_rate=fast", "--config.optim.learning_rate: expected float such as 0.1, got 'fast'"),
        ("data.augment=1", "--config.data.augment: expected bool such as False, got '1'"),
        ("model.features=32", "--config.model.features: expected tuple such as (128, 64), got '32'"),
        ("model.features=('a',)", "--config.model.features: expected tuple such as (128, 64), got \"('a',)\""),
    ],
)
def test_what_the_command_line_gets_wrong_is_named(config, setting, message):
    with pytest.raises(ValueError) as refused:
        train.override(config, [setting])
    assert message in str(refused.value)


def test_unknown_field_in_a_config_file_is_refused_with_the_nearest_name(write):
    with pytest.raises(ValueError, match=r"some\.py: .*learning_rat[^e](.|\n)*learning_rate"):
        train.load_config(write("config.optim.learning_rat = 1.0"))


@pytest.mark.parametrize("line", ["config.train.steps = 'many'", "config.optim.learning_rate = 'fast'"])
def test_wrong_type_in_a_config_file_is_refused(write, line):
    field = line.split()[0].split(".")[-1]
    with pytest.raises(ValueError, match=rf"some\.py: .*{field}"):
        train.load_config(write(line))


def test_a_loaded_config_is_locked(write):
    config = train.load_config(write("config.train.steps = 3"))
    assert config.train.steps == 3
    with pytest.raises(AttributeError):
        config.train.stepps = 4


def test_missing_file_is_answered_with_close_names(write, tmp_path):
    path = write(name="digits.py")
    with pytest.raises(FileNotFoundError, match=r"--config: no file .*digitz\.py; there is .*digits\.py"):
        train.load_config(path.replace("digits", "digitz"))
    with pytest.raises(FileNotFoundError, match=r"--config: no file .*nowhere/digits\.py$"):
        train.load_config(str(tmp_path / "nowhere" / "digits.py"))


def test_variants_reach_the_file_and_are_refused_where_there_are_none(write):
    with_variants = write("config.task = variant", signature="variant='k8'", name="with.py")
    assert train.load_config(with_variants).task == "k8"
    assert train.load_config(f"{with_variants}:k2").task == "k2"
    with pytest.raises(ValueError, match="its get_config takes no variant, got 'k2'"):
        train.load_config(f"{write(name='without.py')}:k2")


def test_an_unknown_variant_is_answered_with_those_that_are(configs):
    with pytest.raises(ValueError, match=r"digits\.py:k3: variant: expected one of .*'k8'"):
        train.load_config(f"{configs}/gcr/digits.py:k3")


def test_file_without_get_config_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"empty\.py: it has no function get_config\(\)"):
        train.load_config(str(tmp_path / "empty.py"))


def test_saved_configs_read_back_and_do_not_differ(config, tmp_path):
    train.save_config(config, tmp_path / "config.json")
    back = train.read_config(tmp_path / "config.json")
    assert train.differing_fields(back, config) == []
    assert back.optim.grassmann.to_dict() == config.optim.grassmann.to_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_differing_fields_are_listed_with_both_values(config):
    other = train.override(config, ["train.steps=7", "model.dims=(2,)"])
    assert train.differing_fields(config, other) == ["model.dims: [8] -> [2]", "train.steps: 0 -> 7"]
    more = ConfigDict({**config.to_dict(), "extra": 1})
    assert train.differing_fields(config, more) == ["extra: None -> 1"]


@pytest.mark.parametrize("content", [b'{"task": "a', b"", b"[1, 2]", b"null", b"\xff\xfe\x00"])
def test_unreadable_config_is_named(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is no config of a run"):
        train.read_config(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json is no config of a run"):
        train.restore(tmp_path)


def test_default_config_can_be_written_as_json():
    assert json.loads(json.dumps(train.default_config().to_dict()))["train"]["best"] == "min:loss"
