"""The command that projects Hugging Face folders: its files are those of the projected parameters."""

import json
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from subspace_jax import interop
from subspace_jax.cli.main import main
from subspace_jax.interop.writing import weights_writer
from subspace_jax.interpret import safety_subspaces as ss
from subspace_jax.interpret.safety_subspaces.folders import FolderSettings, project_folders

from ..variants import rest_slow

SHAPES = {
    "model.embed_tokens.weight": (9, 4),
    "model.layers.0.up.weight": (6, 4),
    "model.layers.1.up.weight": (6, 4),
    "model.norm.weight": (4,),
}
BF16 = np.dtype(ml_dtypes.bfloat16)


def tensors_of(seed, change=()):
    rng = np.random.default_rng(seed)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    tensors["model.layers.1.up.weight"] = tensors["model.layers.1.up.weight"].astype(BF16)
    return {**tensors, "steps": np.array([seed]), **dict(change)}


def write(folder, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    interop.write_safetensors(folder / "model.safetensors", shapes, tensors.values())
    (folder / "config.json").write_text(json.dumps({"folder": folder.name}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def folders(tmp_path):
    """Arguments of the command, and the folders that they name."""
    made = {name: write(tmp_path / name, tensors_of(i)) for i, name in enumerate(("base", "aligned", "tuned"))}
    arguments = ["project-update", "--quiet", "--out", str(tmp_path / "out")]
    for name, folder in made.items():
        arguments += [f"--{name}", str(folder)]
    return arguments, made


def read(folder):
    return {name: np.array(x.read()) for name, x in interop.open_folder(folder).items()}


def trees():
    """The parameters of the three folders, floating-point ones."""
    return [{k: jnp.asarray(x) for k, x in tensors_of(i).items() if k != "steps"} for i in range(3)]


@pytest.mark.parametrize(("side", "own"), rest_slow([("output", "input"), ("input", "output")]))
def test_project_update_writes_the_projected_parameters_of_every_fraction(folders, tmp_path, capsys, side, own):
    arguments, _ = folders
    assert main([*arguments, "--frac", "0.25", "0.5", "--method", "orth", "--side", side]) == 0
    modes = ss.task_modes(*trees(), side=own)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for frac in (0.25, 0.5):
        folder = tmp_path / "out" / f"orth_{frac}"
        got, (want, metrics) = read(folder), modes.project(frac, "orth")
        assert got.pop("steps") == 2
        for name, x in want.items():
            assert got[name].dtype == x.dtype
            np.testing.assert_allclose(
                got[name].astype(np.float32), np.asarray(x, np.float32), atol=0.02 if x.dtype == BF16 else 1e-5
            )
        assert json.loads((folder / "config.json").read_text()) == {"folder": "tuned"}
        assert (folder / "tokenizer.json").is_file()
        told = report["metrics"][report["measured_fracs"].index(frac)]
        for name in ("energy_kept", "cos_task_proj", "cos_task_align"):
            np.testing.assert_allclose(told[name], getattr(metrics, name), rtol=1e-4)
    assert told["removed_by_module"].keys() == {"model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"}
    assert report["weights"]["model.layers.0.up.weight"]["directions"] == 4
    assert (tmp_path / "out" / "energy.png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    assert "orth_0.25/: the model at fraction 0.25" in told
    assert str(tmp_path / "out") in told


def test_project_update_measures_without_a_fraction_and_writes_no_model(folders, tmp_path):
    arguments, _ = folders
    assert main(arguments) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"report.json", "energy.png"}


@pytest.mark.slow
def test_random_energies_of_a_report_are_those_of_random_directions(folders, tmp_path):
    _, made = folders
    drawn = [project_folders(*made.values(), tmp_path / "x", FolderSettings(basis="random", seed=i)) for i in range(60)]
    at = drawn[0].fracs.index(0.5)
    kept = np.mean([report.metrics[at].energy_kept for report in drawn])
    assert abs(kept / drawn[0].random[at] - 1) < 0.08
    assert drawn[0].metrics != drawn[1].metrics


def bad(name, change, **more):
    return {"name": name, "change": change, **more}


@pytest.mark.parametrize(
    ("error", "case"),
    [
        (
            "--base: .*base: expected the tensors of .*tuned; missing: .'model.norm.weight'.; unexpected: none",
            bad("base", lambda t: t.pop("model.norm.weight")),
        ),
        (
            r"--aligned: .*aligned: model.norm.weight: expected shape \(4,\) as in .*tuned, got \(5,\)",
            bad("aligned", lambda t: t.update({"model.norm.weight": np.ones(5, np.float32)})),
        ),
        ("--aligned, --tuned: expected weights that differ", bad("tuned", lambda t: t.update(tensors_of(1)))),
        ("--base, --aligned: expected weights that differ", bad("base", lambda t: t.update(tensors_of(1)))),
        (
            "--tuned: .*tuned: model.norm.weight: expected finite numbers",
            bad("tuned", lambda t: t.update({"model.norm.weight": np.array([1, np.nan, 1, 1], np.float32)})),
        ),
        (
            "--aligned: .*aligned: model.norm.weight: expected finite numbers",
            bad("aligned", lambda t: t.update({"model.norm.weight": np.array([1, np.inf, 1, 1], np.float32)})),
        ),
    ],
)
def test_project_update_refuses_folders_that_can_not_serve(folders, tmp_path, capsys, error, case):
    arguments, made = folders
    tensors = tensors_of(("base", "aligned", "tuned").index(case["name"]))
    case["change"](tensors)
    write(made[case["name"]], tensors)
    assert main([*arguments, "--frac", "0.5"]) == 2
    out = tmp_path / "out"
    assert not out.exists() or not list(out.iterdir())
    message = capsys.readouterr().err
    assert re.search(error, message), message


@pytest.mark.parametrize(
    ("error", "more"),
    [
        ("frac: expected a fraction", ["--frac", "1.5"]),
        ("--frac: expected fractions that differ", ["--frac", "0.5", "0.50"]),
        ("--base: there is no ", ["--base", "{out}/nowhere"]),
        ("--out: expected another folder than that of --tuned", ["--out", "{tuned}"]),
    ],
)
def test_project_update_refuses_arguments_that_can_not_serve(folders, tmp_path, capsys, error, more):
    arguments, made = folders
    places = {"out": tmp_path / "base", "tuned": made["tuned"]}
    before = sorted(tmp_path.rglob("*"))
    assert main([*arguments, *(text.format(**places) for text in more)]) == 2
    assert error in capsys.readouterr().err
    assert [file for file in sorted(tmp_path.rglob("*")) if file.is_file()] == [f for f in before if f.is_file()]


def test_weights_writer_writes_several_files_in_any_order(tmp_path):
    tensors = {name: x for name, x in tensors_of(0).items() if name != "steps"}
    shapes = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    with weights_writer(tmp_path, shapes, shard_bytes=150) as put:
        for name in reversed(tensors):
            put(name, tensors[name])
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for name, x in read(tmp_path).items():
        np.testing.assert_array_equal(x, tensors[name])
    writer = weights_writer(tmp_path, {"model.norm.weight": shapes["model.norm.weight"]})
    with pytest.raises(ValueError, match=r"tensors that were not written: \['model.norm.weight'\]"), writer:
        pass
