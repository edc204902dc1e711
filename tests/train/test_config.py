import json

import pytest
from ml_collections import ConfigDict

from subspace_jax import train
from subspace_jax.represent.gcr import task as classify
from subspace_jax.train import fields


@pytest.fixture
def config():
    return classify.default_config()


@pytest.fixture
def write(tmp_path):
    """Writes a config file whose ``get_config`` has these lines, and returns its path."""

    def make(*lines, signature="", name="some.py"):
        body = "\n".join(f"    {line}" for line in ("config = classify.default_config()", *lines, "return config"))
        path = tmp_path / name
        path.write_text(
            f"from subspace_jax.represent.gcr import task as classify\n\ndef get_config({signature}):\n{body}\n"
        )
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
        ("optim.manifol.name=riemannian_sgd", "unknown field; did you mean optim.manifold.name?"),
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
    assert back.optim.manifold.to_dict() == config.optim.manifold.to_dict()
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


@pytest.mark.parametrize("text", ["4,8", "(4, 8)", "[4, 8]", "4, 8,"])
def test_tuples_are_overridden_alike_in_a_fresh_config_and_in_one_that_was_saved(config, tmp_path, text):
    train.save_config(config, tmp_path / "config.json")
    for base in (config, train.read_config(tmp_path / "config.json"), ConfigDict(json.loads(config.to_json()))):
        changed = train.override(base, [f"model.dims={text}", f"data.image.scale={text}"])
        assert tuple(changed.model.dims) == (4, 8)
        assert tuple(changed.data.image.scale) == (4.0, 8.0)
        assert train.differing_fields(config, changed) == [
            "data.image.scale: [0.08, 1.0] -> [4.0, 8.0]",
            "model.dims: [8] -> [4, 8]",
        ]


def test_every_shipped_config_comes_back_from_json_and_takes_the_same_settings(configs, tmp_path):
    for file in sorted(configs.glob("*/*.py")):
        config = train.load_config(str(file))
        train.save_config(config, tmp_path / "config.json")
        back = train.read_config(tmp_path / "config.json")
        assert back.to_dict() == config.to_dict()
        # Each field as text again: the config stays what it is, tuples and floats too.
        settings = [f"{name}={value}" for name, value in fields.flatten(config).items()]
        for base in (config, back):
            assert train.override(base, settings).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("data.augment=true", True),
        ("data.name=a=b,c", "a=b,c"),
        ("data.name=", ""),
        ("model.features=()", ()),
        ("model.features=[]", ()),
        ("data.image.scale=(1, 1)", (1.0, 1.0)),
        ("model.gamma=-2", -2.0),
        ("optim.learning_rate=1e-3", 1e-3),
    ],
)
def test_override_reads_values_as_they_are_written(config, setting, value):
    changed = fields.flatten(train.override(config, [setting]))[setting.partition("=")[0]]
    assert (changed, type(changed)) == (value, type(value))


@pytest.mark.parametrize(
    "setting",
    [
        *(
            "train.steps=1e-3",
            "train.steps=None",
            "data.augment=yes",
            "optim.learning_rate=True",
            "optim.final_scale=nan",
        ),
        *("model.dims=None", "model.dims=(1.5,)", "model.dims=" + "(" * 500, "train.steps={[]: 1}"),
    ],
    ids=lambda setting: setting[:30],
)
def test_override_refuses_what_is_of_another_type_in_one_line(config, setting):
    with pytest.raises(ValueError, match=rf"^--config\.{setting.partition('=')[0]}: expected .*got[^\n]*$"):
        train.override(config, [setting])


def test_override_of_a_field_that_is_none_takes_any_literal():
    assert train.override(ConfigDict({"limit": None}), ["limit=3"]).limit == 3
    assert train.override(ConfigDict({"limit": None}), ["limit=None"]).limit is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'a': 1\n", r"some\.py:1: no Python: '\{' was never closed"),
        ("x = 1\ndef get_config(:\n", r"some\.py:2: no Python: invalid syntax"),
        ("\0", r"some\.py: .*null bytes"),
        ("import no_such_module\n", r"some\.py: .*some\.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1\ny = 1 / 0\n", r"some\.py: .*some\.py:2: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)\n", r"some\.py: .*some\.py:2: SystemExit: 3"),
        ("get_config = 3\n", r"it has no function get_config\(\)"),
        ("def get_config():\n    return None\n", r"returned NoneType, expected an ml_collections\.ConfigDict"),
        ("def get_config():\n    return {'seed': 0}\n", r"get_config\(\) returned dict, expected"),
        ("def get_config(a, b):\n    return a\n", r"some\.py: .*TypeError: get_config\(\) missing"),
        ("def get_config():\n    return undefined\n", r"some\.py:2: NameError: name 'undefined'"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_config_is_named_with_its_line_in_one_line(text, message, tmp_path):
    (tmp_path / "some.py").write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        train.load_config(str(tmp_path / "some.py"))
    assert "\n" not in str(refused.value)


def test_load_config_asks_for_python_and_finds_files_in_a_misspelt_folder(write, tmp_path, configs):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected a Python file \(\.py\).*config\.json"):
        train.load_config(str(tmp_path / "config.json"))
    with pytest.raises(FileNotFoundError, match=r"no file .*gcr/digits\.py; there is .*configs/gcr/digits\.py"):
        train.load_config(str(configs).replace("configs", "confgs") + "/gcr/digits.py")
    with pytest.raises(FileNotFoundError, match=r"no file .*gcr; there is .*configs/gcr/"):
        train.load_config(f"{configs}/gcr")


def test_complete_config_fills_what_an_earlier_version_did_not_write_and_refuses_other_types(config):
    saved = json.loads(json.dumps(config.to_dict()))
    del saved["train"]["max_skipped"]
    saved["optim"]["learning_rate"] = 1
    saved["own"] = 3
    done = fields.complete_config(ConfigDict(saved), config)
    assert done.train.max_skipped == 100
    assert done.own == 3
    assert (done.optim.learning_rate, type(done.optim.learning_rate)) == (1.0, float)
    assert done.model.features == (128, 64)
    for name, value, message in [
        ("seed", None, "seed: expected int such as 0, got None"),
        ("seed", True, "seed: expected int such as 0, got True"),
        ("optim", 3, "optim: expected the fields clip_norm, .*learning_rate, .*got 3"),
        ("model", {"features": ["a"]}, r"model\.features: expected tuple such as \(128, 64\), got \['a'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            fields.complete_config(ConfigDict({**saved, name: value}), config)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=-1", "seed: expected at least 0"),
        ("seed=4294967296", r"seed: expected at least 0 and below 2\^32"),
        ("train.epochs=1e400", "train.epochs: expected a finite number, got inf"),
        ("train.steps=1000000000000000000", "train.steps: expected at most 2147483647, got 1000000000000000000"),
        ("train.data_timeout=-1", "train.data_timeout: expected a finite number at least 0, got -1.0"),
        ("train.max_skipped=-1", "train.max_skipped: expected at least 0, got -1"),
        ("data.name=" + "x" * 10_001, "data.name: expected at most 10000 characters, got 10001"),
    ],
    ids=lambda text: text[:30],
)
def test_check_run_fields_names_the_field_that_is_out_of_range(config, setting, message):
    with pytest.raises(ValueError, match=message):
        fields.check_run_fields(train.override(config, [setting]))


def test_complete_config_keeps_the_keyword_arguments_of_an_optimizer_as_they_are(config):
    with config.unlocked():
        config.optim.kwargs = {"momentum": 0.5}
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.optim.kwargs = {}
    assert fields.complete_config(other, config).optim.kwargs.to_dict() == {}


def test_override_with_another_optimizer_drops_the_keyword_arguments_of_the_one_before():
    config = train.default_config()
    config.optim.name, config.optim.kwargs = "sgd", {"momentum": 0.9}
    kept = train.override(config, ["optim.kwargs.weight_decay=0.1"]).optim
    assert kept.kwargs.to_dict() == {"momentum": 0.9, "weight_decay": 0.1}
    same = train.override(config, ["optim.name=sgd"]).optim
    assert same.kwargs.to_dict() == {"momentum": 0.9}
    other = train.override(config, ["optim.kwargs.rank=4", "optim.name=galore"]).optim
    assert other.kwargs.to_dict() == {"rank": 4}
    assert config.optim.kwargs.to_dict() == {"momentum": 0.9}
