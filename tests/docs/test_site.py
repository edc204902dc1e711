"""The site: its navigation, its links, and the names that it documents."""

import importlib
import inspect
import re
import subprocess
import sys

import pytest
import yaml

import subspace_jax
from tests.docs.pages import DOCS, PAGES, REPOSITORY, page_id, without_code

CONFIG = REPOSITORY / "mkdocs.yml"


def nav_files(entry):
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [file for value in values for file in nav_files(value)]


def config():
    return yaml.safe_load(CONFIG.read_text())


def anchors(page):
    """Anchors of the headings of a page, as MkDocs generates them."""
    headings = re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_navigation_names_every_page_once():
    files = nav_files(config()["nav"])
    assert sorted(files) == sorted(page_id(page) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if linked.suffix == ".png":
            assert linked.is_file(), f"{target} in {page_id(page)}"
            continue
        assert linked in PAGES, f"{target} in {page_id(page)}"
        assert not anchor or anchor in anchors(linked), f"{target} in {page_id(page)}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_reference_links_name_public_objects(page):
    for target in re.findall(r"\]\[([\w.]+)\]", without_code(page)):
        module, _, name = target.rpartition(".")
        assert hasattr(importlib.import_module(module), name), f"{target} in {page_id(page)}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_named_on_pages_exist(page):
    named = re.findall(r"`((?:subspace_jax|configs|colabs|scripts|tests|docs|examples)/[\w./]*)`", page.read_text())
    for name in named:
        placeholder = re.search(r"/[A-Z]+\b", name)
        assert placeholder or (REPOSITORY / name).exists(), f"{name} in {page_id(page)}"


def test_every_subpackage_has_a_reference_page():
    packages = [name for name in subspace_jax.__all__ if name != "__version__"]
    assert {f"reference/{name}.md" for name in packages} <= {page_id(page) for page in PAGES}


def test_site_loads_no_fonts_or_scripts_from_other_hosts():
    theme = config()["theme"]
    assert theme["font"] is False
    assert not {"site_url", "repo_url", "extra_javascript", "extra_css"} & config().keys()


def public_names():
    """Functions and classes of the reference, each as the set of its possible names."""
    for package in subspace_jax.__all__:
        module = importlib.import_module(f"subspace_jax.{package}") if package != "__version__" else None
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.ismodule(value):
                for inner, function in inspect.getmembers(value, inspect.isfunction):
                    if not inner.startswith("_") and function.__module__ == value.__name__:
                        yield {f"{value.__name__}.{inner}"}
            elif inspect.isfunction(value) or inspect.isclass(value):
                yield {f"{module.__name__}.{name}", f"{value.__module__}.{value.__qualname__}"}


def test_site_builds_strictly_and_documents_every_public_name_functions_before_states(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    html = "".join(page.read_text() for page in (tmp_path / "site").rglob("*.html"))
    shown = set(re.findall(r'id="(subspace_jax[\w.]+)"', html))
    missing = [names for names in public_names() if not names & shown]
    assert not missing
    assert not re.search(r":(?:func|class|mod|meth|attr):", html)
    optim = (tmp_path / "site" / "reference" / "optim" / "index.html").read_text()
    groups = [optim.index(f'id="subspace_jax.optim-{kind}"') for kind in ("functions", "classes", "states")]
    assert groups[0] < optim.index('id="subspace_jax.optim.galore"') < groups[1] < groups[2]
    assert groups[2] < optim.index('id="subspace_jax.optim.LoRAPlusState"')
    assert not re.search(r"See <code>", optim), "a reference in the description of an argument is no link"
    for source in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', html):
        raise AssertionError(f"the site loads {source}")


def test_docs_folder_has_no_stray_files():
    files = {path.relative_to(DOCS) for path in DOCS.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    known = {path for path in files if path.suffix in {".md", ".png", ".svg"} or path.match("figures/*.json")}
    tools = {"_tools/griffe_extensions.py", "_tools/templates/python/material/children.html.jinja"}
    assert {path.as_posix() for path in files - known} == tools
