"""The commands that list methods and configs, without loading JAX."""

import argparse
import textwrap

from subspace_jax.cli import shared

_METHODS = """
    subspace-jax methods                 # all of them
    subspace-jax methods grassmann       # by name, title, area, paper or a word of the description
    subspace-jax methods 2402.09353      # by arXiv id
    """
_CONFIGS = """
    subspace-jax configs                 # all of them
    subspace-jax configs digits          # by a part of the name, or a word of the first line
    """


def add_commands(commands) -> None:
    """Adds ``methods`` and ``configs``."""
    methods = shared.add_command(commands, "methods", "list the methods of the library", _list_methods, _METHODS)
    methods.add_argument("words", nargs="*", metavar="WORD", help="what to search for (default: all)")
    configs = shared.add_command(commands, "configs", "list the configs that --config takes", _list_configs, _CONFIGS)
    configs.add_argument("word", nargs="?", default="", metavar="WORD", help="what to search for (default: all)")


def _list_methods(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import methods

    query = " ".join(args.words)
    found = methods.find_methods(query)
    if not found:
        raise shared.NothingFoundError(f"no method matches {query!r}; {methods.nearest_names(query)}")
    if len(found) > 5:
        for method in found:
            print(f"{method.name:<20} {method.area:<10} {method.title}")
        print("\n`subspace-jax methods NAME` shows more of one.")
    else:
        for method in found:
            _show(method)


def _show(method) -> None:
    papers = f", arXiv {', '.join(method.arxiv)}" if method.arxiv else ""
    print(f"{method.name} ({method.area}): {method.title}{papers}")
    print(textwrap.indent(textwrap.fill(method.summary, 96), "    "))
    first = method.figures[0]
    bounds = f": {first.requirement}" if first.requirement else ""
    rows = (
        ("command", method.command),
        ("figure", f"{first.name}{bounds}"),
        ("configs", " ".join(method.configs)),
        ("module", method.module),
        ("docs", method.doc),
    )
    print("".join(f"    {name:<8} {value}\n" for name, value in rows))


def _list_configs(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import config_files

    configs = [config_files.read_config_file(name) for name in config_files.config_names()]
    word = args.word.removeprefix("configs/").removesuffix(".py").lower()
    found = [config for config in configs if word in f"{config.name} {config.summary}".lower()]
    if not found:
        near = config_files.near_names(word, [config.name for config in configs])
        hint = f"did you mean {' or '.join(near)}?" if near else "`subspace-jax configs` lists all of them"
        raise shared.NothingFoundError(f"no config matches {args.word!r}; {hint}")
    for config in found:
        print(f"{config.name}\n    {config.summary}")
        if config.variants:
            print(textwrap.indent(textwrap.fill(config.variants, 96), "    "))
        if config.needs_clone:
            print("    Its task lies in examples/: it needs a clone of the repository.")
