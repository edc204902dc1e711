"""Searching the index."""

import difflib
import re

from subspace_jax.methods.index import METHODS
from subspace_jax.methods.records import Method


def find_methods(query: str) -> tuple[Method, ...]:
    """Returns the methods that hold every word of a query: in name, area, title, paper, arXiv id or summary."""
    words = query.lower().split()
    return tuple(method for method in METHODS if all(word in _text(method) for word in words))


def near_methods(query: str) -> tuple[Method, ...]:
    """Returns the methods with a word close to one of a query, the closest first."""
    words = [set(re.findall(r"[\w+.-]{3,}", _text(method))) for method in METHODS]
    scores = {}
    for method, known in zip(METHODS, words, strict=True):
        near = [
            (word, other)
            for word in query.lower().split()
            for other in difflib.get_close_matches(word, known, cutoff=0.75)
        ]
        if near:
            scores[method.name] = max(difflib.SequenceMatcher(None, *pair).ratio() for pair in near)
    return tuple(sorted((m for m in METHODS if m.name in scores), key=lambda m: -scores[m.name]))[:3]


def nearest_names(query: str) -> str:
    """Returns the end of a message about a method that is not there: the names that the query may mean, or all."""
    near = (find_methods(query) or near_methods(query))[:3]
    names = ", ".join(method.name for method in near or METHODS)
    return f"did you mean {names}?" if near else f"there are {names}"


def _text(method: Method) -> str:
    fields = (method.name, method.area, method.title, method.paper, *method.arxiv, method.summary)
    return " ".join(fields).lower()
