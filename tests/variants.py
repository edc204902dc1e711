"""Variants of which one runs in the quick run."""

import pytest


def rest_slow(*values):
    """Values for ``pytest.mark.parametrize``: the first one in every run, the others in the slow run only."""
    first, *others = values
    return [first, *(pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.slow) for x in others)]
