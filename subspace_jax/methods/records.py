"""What the index says about a method, and short forms of the commands in it."""

from typing import NamedTuple


class Figure(NamedTuple):
    """A figure that a command must reach.

    Attributes:
      name: What is measured, on what.
      command: The command of one seed.  ``scripts/figures.py`` appends ``--workdir`` and ``--config.seed``, ``--out``
        and ``--seed`` where it takes no config, or ``--junitxml`` where it is pytest.
      metric: Name in the run's ``result.json``; of pytest ``failures``, or a property that a test records.
      at_least: Lower bound, inclusive.  A figure without bounds is there for comparison.
      at_most: Upper bound, inclusive.
      seeds: Seeds of the runs.
      reduce: ``"mean"`` or ``"median"`` over the seeds.
      minus: Command of a baseline whose value is subtracted.
      over: Command of a baseline by whose value is divided.
    """

    name: str
    command: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    reduce: str = "mean"
    minus: str = ""
    over: str = ""

    @property
    def requirement(self) -> str:
        """The bounds as text, such as ``"at least 0.97"``; empty where there are none."""
        bounds = (("at least", self.at_least), ("at most", self.at_most))
        return ", ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


class Method(NamedTuple):
    """A method of the library.

    Attributes:
      name: Its name, of lower-case words with hyphens.
      area: What it is for.
      title: Title for people.
      paper: Title of the paper; empty where there is none.
      arxiv: arXiv ids, that of the paper first.
      summary: What it does, in one paragraph: the first of its page.
      module: Module with its public names.
      configs: Names of its configs, see ``subspace-jax configs``.
      command: A command to begin with.
      figures: What it must reach, the most telling first.
      needs: Names for ``subspace-jax fetch``: what its commands read.
    """

    name: str
    area: str
    title: str
    paper: str
    arxiv: tuple[str, ...]
    summary: str
    module: str
    configs: tuple[str, ...]
    command: str
    figures: tuple[Figure, ...]
    needs: tuple[str, ...] = ()

    @property
    def doc(self) -> str:
        """Path of its page in the repository."""
        return f"docs/methods/{self.name}.md"

    @property
    def figure_file(self) -> str:
        """Path of its measured figures in the repository."""
        return f"docs/figures/{self.name}.json"


def train(config: str) -> str:
    """Returns the command that trains a config."""
    return f"subspace-jax train --config {config}"


def golden(*files: str) -> Figure:
    """Returns the figure of tests against golden vectors: none of them fails."""
    return Figure(
        "golden vectors to 1e-9, failed tests", f"python -m pytest {' '.join(files)}", "failures", at_most=0, seeds=(0,)
    )
