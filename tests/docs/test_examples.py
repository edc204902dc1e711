"""The pages under docs/ and the README: their Python runs, and their commands name existing configs and fields."""

import importlib.util
import re
import shlex
import sys

import jax
import pytest

from subspace_jax import train
from tests.docs.pages import PAGES, README, REPOSITORY, fenced_blocks, page_id


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the configs of the repository, as in a clone."""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


# Libraries that pages show and the tests' environment need not have.
PEERS = ("equinox", "tunix")


def peers_of(block):
    return [name for name in PEERS if re.search(rf"^(?:import|from) {name}\b", block.text, re.MULTILINE)]


def run_page(page, folder):
    """Executes the Python of a page in one namespace; blocks with a title are written to a file of that name.

    Blocks that import a peer which is not installed are left out.
    """
    namespace = {"__name__": "__main__"}
    for block in fenced_blocks(page):
        if block.language != "python" or any(importlib.util.find_spec(name) is None for name in peers_of(block)):
            continue
        title = re.search(r'title="([^"]+)"', block.options)
        if title:
            (folder / title[1]).write_text(block.text)
        else:
            # Empty lines in front make tracebacks show the line of the page.
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
    return namespace


PYTHON_PAGES = [page for page in (README, *PAGES) if any(block.language == "python" for block in fenced_blocks(page))]


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=page_id)
def test_python_of_a_page_runs(page, folder):
    # JAX's default settings, as users have: the strict ones of the tests reject the dtypes of Optax's Adam.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert run_page(page, folder)


@pytest.mark.parametrize("name", PEERS)
def test_optimizers_page_has_a_recipe_for_a_peer(name):
    page = next(page for page in PAGES if page.name == "optimizers.md")
    assert any(name in peers_of(block) for block in fenced_blocks(page))


TRAIN = {"train", "pretrain", "finetune", "plan"}


def train_commands(page):
    for block in fenced_blocks(page):
        if block.language in ("bash", "console"):
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "subspace-jax" in words and TRAIN & set(words) and "--config" in words:
                    yield words


@pytest.mark.parametrize("page", [page for page in (README, *PAGES) if any(train_commands(page))], ids=page_id)
def test_commands_of_a_page_name_configs_and_fields_that_exist(page, folder):
    for block in fenced_blocks(page):
        if title := re.search(r'title="([^"]+)"', block.options):
            (folder / title[1]).write_text(block.text)
    for words in train_commands(page):
        config = train.load_config(words[words.index("--config") + 1])
        overrides = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
        train.override(config, overrides)
        assert "--workdir" in words or "plan" in words


def test_make_targets_on_pages_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    named = {target for page in (README, *PAGES) for target in re.findall(r"\bmake ([a-z-]+)", "".join(code_of(page)))}
    assert named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def code_of(page):
    text = page.read_text()
    yield from (f"{block.text}\n" for block in fenced_blocks(page) if block.language in ("bash", "console"))
    yield from (f"{span}\n" for span in re.findall(r"`(make [a-z-]+)`", text))
