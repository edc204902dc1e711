"""The page of an autoencoder: figures, and the texts where its features are most active."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from subspace_jax import train
from subspace_jax.interpret.polysae.study import Occurrences, top_places

_BEFORE, _AFTER, _CONTEXTS = 16, 8, 6
_MEANS = {
    "explained_variance": "share of the activations' variance that the reconstruction keeps; 1 is all",
    "mse": "squared error, summed over the entries of an activation",
    "l0": "features that are active at a time",
    "dead": "share of the features that nothing in the evaluation set fires",
    "loss_recovered": "1: the model loses nothing with the reconstruction for the activations; 0: as with zeros",
    "loss_recovered_from_mean": "the same with the mean activation instead of zeros",
    "correlation": "of the strength of interactions with being active together",
    "wasserstein1": "mean distance of a feature's values between a class and the others",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1000px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 14px; margin: .6em 0 }
td, th { border-bottom: 1px solid #ddd; padding: .15em 1em .15em 0; text-align: left }
section { border-top: 1px solid #ccc; margin-top: 1em }
h2 { font-size: 18px; margin-bottom: .2em } h3 { font-size: 15px; margin: .5em 0 .2em }
code { font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap }
mark { background: #ffd54f }
.value { color: #777; font-size: 12px; display: inline-block; width: 4.5em }
"""


class Context(NamedTuple):
    """A place where a feature is active.

    Attributes:
      value: Its value.
      before: Text before the token.
      token: The token.
      after: Text after it.
    """

    value: float
    before: str
    token: str
    after: str


class Feature(NamedTuple):
    """A feature as the page shows it.

    Attributes:
      number: Its number.
      share: Share of the positions at which it is active.
      contexts: Where it is most active.
    """

    number: int
    share: float
    contexts: Sequence[Context]


def describe(found: Occurrences, rows: Mapping[str, np.ndarray], chosen: np.ndarray, tokenizer: Any) -> list[Feature]:
    """Returns features with the texts around the places where they are most active.

    Args:
      found: Where features are active.
      rows: The packed texts, ``inputs`` and ``segment_ids`` ``[rows, length]``.
      chosen: Numbers of features.
      tokenizer: With ``decode(tokens)``.
    """
    features = []
    for number in chosen:
        contexts = []
        for row, column, value in top_places(found, int(number), _CONTEXTS):
            tokens, segments = rows["inputs"][row], rows["segment_ids"][row]
            own = np.flatnonzero(segments == segments[column])
            start, stop = max(own[0], column - _BEFORE), min(own[-1] + 1, column + 1 + _AFTER)
            parts = (tokens[start:column], tokens[column : column + 1], tokens[column + 1 : stop])
            contexts.append(Context(value, *(tokenizer.decode([int(t) for t in part]) for part in parts)))
        share = float(np.sum(found.features == number)) / max(found.positions, 1)
        features.append(Feature(int(number), share, contexts))
    return features


def write_page(
    out: Path,
    title: str,
    figures: Mapping[str, float],
    features: Sequence[Feature],
    pairs: Sequence[tuple] = (),
    vectors: str | None = None,
) -> None:
    """Writes ``report.html``, one file that needs nothing else, and ``features.json``.

    Args:
      out: The folder.
      title: Title of the page.
      figures: What was measured, by name.
      features: The features to show.
      pairs: Pairs of features that interact most: both numbers, strength, positions at which both are active.
      vectors: Where the vectors are whose numbers stand in place of texts; None for texts.
    """
    with train.replacing(out / "features.json") as partial:
        shown = [f._asdict() | {"contexts": [c._asdict() for c in f.contexts]} for f in features]
        named = [dict(zip(("first", "second", "strength", "together"), pair, strict=True)) for pair in pairs]
        partial.write_text(json.dumps({"figures": dict(figures), "features": shown, "pairs": named}, indent=1) + "\n")
    with train.replacing(out / "report.html") as partial:
        partial.write_text(_page(title, figures, features, pairs, vectors), encoding="utf-8")


def _page(title, figures, features, pairs, vectors) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{value:.4g}</td><td>{_meaning(name)}</td></tr>"
        for name, value in figures.items()
    )
    parts = [f"<h1>{html.escape(title)}</h1><table>{rows}</table>"]
    by_number = {f.number: f for f in features}
    if pairs:
        parts.append("<h2>Strongest interactions</h2><p>What two features add together beyond their sum.</p>")
        head = (
            f"<tr><th>features</th><th>strength</th><th>together</th><th>{'items' if vectors else 'tokens'}</th></tr>"
        )
        lines = []
        for first, second, strength, together in pairs:
            words = " + ".join(_tokens(by_number.get(number)) for number in (first, second))
            links = " × ".join(f'<a href="#f{n}">{n}</a>' if n in by_number else str(n) for n in (first, second))
            lines.append(f"<tr><td>{links}</td><td>{strength:.3g}</td><td>{together:.0f}</td><td>{words}</td></tr>")
        parts.append(f"<table>{head}{''.join(lines)}</table>")
    parts.append(f"<h2>{len(features)} features</h2><p>{_selection(vectors)}</p>")
    parts += [_section(feature, "vectors" if vectors else "positions") for feature in features]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f"{head}<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"


def _meaning(name: str) -> str:
    if name.startswith("probe_f1_"):
        return f"F1 of logistic probes on {name.rpartition('_')[2]} of the features"
    return _MEANS.get(name, "")


def _selection(vectors: str | None) -> str:
    if vectors is None:
        return (
            "The most active of those that at least three rows of the texts fire, and at most a tenth of the "
            "positions; of each, the places with the largest values, one of a row."
        )
    return (
        "The most active of those that at least three vectors of the evaluation fire, and at most a tenth of them; of "
        f"each, the vectors with the largest values, by their number from 0 in {html.escape(vectors)}."
    )


def _tokens(feature: Feature | None) -> str:
    if feature is None:
        return "–"
    words = list(dict.fromkeys(context.token.strip() for context in feature.contexts))[:3]
    return "<code>" + html.escape(", ".join(words)) + "</code>"


def _section(feature: Feature, counted: str) -> str:
    lines = [
        f'<div><span class="value">{c.value:.2f}</span><code>{html.escape(c.before)}<mark>{html.escape(c.token)}</mark>'
        f"{html.escape(c.after)}</code></div>"
        for c in feature.contexts
    ]
    return (
        f'<section id="f{feature.number}"><h3>Feature {feature.number}, active at {100 * feature.share:.2g} % of the '
        f"{counted}</h3>{''.join(lines)}</section>"
    )
