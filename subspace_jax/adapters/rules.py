"""Rules that select weights by path: globs and regular expressions."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

PyTree = Any

_WEIGHT_NAMES = ("kernel", "embedding", "weight")


def path_of(path: tuple) -> str:
    """Formats a key path of JAX as ``"layers/attn/q/kernel"``."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def match_rules(
    rules: Mapping[str | re.Pattern, Any],
    paths: Iterable[str],
    admits: Callable[[str, Any], bool] = lambda path, value: True,
    *,
    name: str = "rules",
) -> dict[str, Any]:
    """Returns the value of the first rule that matches each path.

    A rule is one of:

    * A glob, such as ``"attn/q"`` or ``"layers/**/kernel"``.  ``*`` matches within one part of a path, ``**``
      any number of parts, ``?`` one character.  A glob may name the last parts only, like the entries of PEFT's
      ``target_modules``: ``"q"`` matches every ``.../q``, and no ``.../gate_q``.  A last part ``kernel``,
      ``embedding`` or ``weight`` may be omitted.
    * A regular expression, ``"re:..."`` or a compiled pattern, which has to match the full path
      (``"re:layers/(attn|mlp)/.*"``).

    Args:
      rules: Rule to value, in order of precedence.
      paths: Paths of the weights.
      admits: Whether a value may be given to a path; otherwise the rule is skipped.
      name: Name of the argument in the messages of errors.

    Returns:
      Path to value, in the order of ``paths``; paths that no rule matches are left out.

    Raises:
      ValueError: There are no rules, a regular expression is malformed, or a rule matches nothing; the message then
        shows close names, or that earlier rules match the same paths.

    Examples:
      >>> match_rules({"q": 1, "re:.*mlp.*": 2}, ["attn/q/kernel", "attn/k/kernel", "mlp/up/kernel"])
      {'attn/q/kernel': 1, 'mlp/up/kernel': 2}
    """
    paths = list(paths)
    if not rules:
        raise ValueError(f"{name}: expected at least one rule, got none")
    patterns = {rule: _pattern(rule, name) for rule in rules}
    chosen = {}
    for path in paths:
        matching = (rule for rule in rules if patterns[rule].fullmatch(path) and admits(path, rules[rule]))
        rule = next(matching, None)
        if rule is not None:
            chosen[path] = rule
    for rule in rules:
        if rule not in chosen.values():
            able = [path for path in paths if admits(path, rules[rule])]
            _raise_unmatched(rule, patterns[rule], able, chosen, name)
    return {path: rules[rule] for path, rule in chosen.items()}


def _pattern(rule: str | re.Pattern, name: str) -> re.Pattern:
    if isinstance(rule, re.Pattern):
        return rule
    if not isinstance(rule, str) or not rule:
        raise ValueError(
            f"{name}: expected a glob, 're:' and a regular expression, or a compiled pattern, got {rule!r}"
        )
    if rule.startswith("re:"):
        try:
            return re.compile(rule[3:])
        except re.error as error:
            raise ValueError(f"{name}: {rule!r} is not a regular expression: {error}") from error
    pieces = re.split(r"(\*\*|\*|\?)", rule)
    wild = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    glob = "".join(wild.get(piece, re.escape(piece)) for piece in pieces)
    return re.compile(f"(?:.*/)?{glob}(?:/(?:{'|'.join(_WEIGHT_NAMES)}))?")


def _raise_unmatched(rule, pattern, paths, chosen, name) -> None:
    text = rule if isinstance(rule, str) else f"pattern {rule.pattern}"
    if taken := [path for path in paths if pattern.fullmatch(path)]:
        raise ValueError(
            f"{name}: earlier rules match everything that {text!r} matches: {chosen[taken[0]]!r} has {taken}"
        )
    wanted = text.removeprefix("re:")
    ends = {end: path for path in paths for end in _names(path)}
    near = dict.fromkeys(ends[end] for end in difflib.get_close_matches(wanted, ends, n=5, cutoff=0.4))
    shown = list(near) or paths[:12]
    more = "" if near or len(paths) <= 12 else f" and {len(paths) - 12} more"
    raise ValueError(
        f"{name}: {text[:200]!r} matches none of {len(paths)} weights; {'near' if near else 'there are'}: {shown}{more}"
    )


def _names(path: str) -> list[str]:
    """Returns the endings by which a glob may name a path."""
    parts = path.split("/")
    ends = ["/".join(parts[i:]) for i in range(len(parts))]
    return ends + ["/".join(parts[i:-1]) for i in range(len(parts) - 1)]


def insert(tree: dict, path: str, value: Any) -> None:
    """Sets a value of a nested dict."""
    *parents, last = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value


def adapters_of(trainable: PyTree) -> dict[str, dict[str, Any]]:
    """Returns the arrays of each adapter of a trainable tree: path of the weight to arrays by name."""
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
        found.setdefault(path_of(path[:-1]), {})[path_of(path[-1:])] = leaf
    return found
