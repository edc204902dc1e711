"""Which cases of a parametrized test are in the quick run."""

import pytest


def rest_slow(cases, *quick):
    """Cases for ``pytest.mark.parametrize``: slow but for the quick ones, by default the first; tuples are unpacked."""
    cases = list(cases)
    quick = quick or cases[:1]
    assert all(case in cases for case in quick), quick
    marked = [(case, [] if case in quick else pytest.mark.slow) for case in cases]
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks) for case, marks in marked]
