"""The index of methods: everything that it names exists, and its commands parse."""

import importlib.util
import json
import pathlib
import shlex
import subprocess
import sys

import pytest

from subspace_jax import config_files, methods, train
from subspace_jax.cli import main as cli

ROOT = pathlib.Path(__file__).parents[1]

each_method = pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.name)


def test_names_of_methods_are_unique_and_areas_are_known():
    names = [method.name for method in methods.METHODS]
    assert len(set(names)) == len(names)
    assert all((ROOT / "subspace_jax" / method.area).is_dir() for method in methods.METHODS)


@each_method
def test_module_and_configs_of_a_method_exist(method):
    assert importlib.util.find_spec(method.module)
    assert set(method.configs) <= set(config_files.config_names())


@each_method
def test_page_of_a_method_begins_with_its_summary_and_names_its_papers(method):
    text = (ROOT / method.doc).read_text()
    title, first, *_ = text.split("\n\n")
    assert title == f"# {method.title}"
    assert " ".join(first.split()) == " ".join(method.summary.split())
    assert all(f"https://arxiv.org/abs/{number}" in text for number in method.arxiv)
    assert f"methods/{method.name}.md" in (ROOT / "mkdocs.yml").read_text()


@each_method
def test_commands_of_a_method_parse_and_their_configs_take_their_fields(method):
    figures = [text for figure in method.figures for text in (figure.command, figure.minus, figure.over) if text]
    for command in {method.command, *figures}:
        program, *words = shlex.split(command)
        if program == "python":
            assert words[:2] == ["-m", "pytest"]
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
            continue
        assert program == "subspace-jax"
        folder = ["--workdir" if "--config" in words else "--out", "work/x"]
        args, overrides = cli._parse([*words, *([] if command == method.command else folder)])
        if getattr(args, "config", None):
            train.override(train.load_config(args.config), overrides)


@each_method
def test_figures_of_a_method_are_measured_and_reach_their_bounds(method):
    found = json.loads((ROOT / method.figure_file).read_text())
    assert found["method"] == method.name
    assert [entry["name"] for entry in found["figures"]] == [figure.name for figure in method.figures]
    for entry, figure in zip(found["figures"], method.figures, strict=True):
        assert entry["command"] == figure.command
        assert (entry["at_least"], entry["at_most"]) == (figure.at_least, figure.at_most)
        assert len(entry["values"]) == len(figure.seeds)
        assert entry["met"], figure.name


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("grass", "gcr"),
        ("2402.09353", "dora"),
        ("galore", "coso"),
        ("objective landscapes", "intrinsic-dimension"),
        ("PEFT", "dora"),
        ("optim lora", "adaprelora"),
    ],
)
def test_find_methods_searches_name_area_title_paper_and_summary(query, first):
    assert methods.find_methods(query)[0].name == first


def test_index_leads_to_every_config():
    listed = {name for method in methods.METHODS for name in method.configs}
    assert listed == set(config_files.config_names())


@pytest.mark.parametrize("name", ["dora", "adaprelora", "smollm2"])
def test_a_method_lists_the_config_that_runs_it_on_a_real_model(name):
    assert "lm/smollm2" in next(method for method in methods.METHODS if method.name == name).configs


def test_near_methods_finds_misspelled_names():
    assert not methods.find_methods("grasmann")
    assert methods.near_methods("grasmann")[0].name == "gcr"
    assert methods.near_methods("galroe")[0].name == "coso"
    assert methods.near_methods("xyzzy") == ()


def test_methods_and_configs_are_listed_without_jax():
    code = (
        "import sys; from subspace_jax.cli.main import main\n"
        "for command in ('methods', 'configs'): assert main([command, 'grass']) == 0\n"
        "heavy = {'jax', 'numpy', 'flax', 'optax', 'ml_collections'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("gcr (represent): Grassmann class representation, arXiv 2308.01547")
    assert "gcr/cifar10" in done.stdout
