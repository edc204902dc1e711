"""Which cases of a parametrized test are in the quick run."""

import pytest


def rest_slow(cases, *quick):
    """The cases as pytest parameters, slow but for those that are quick."""
    cases = list(cases)
    assert all(case in cases for case in quick), quick
    marked = [(case, [] if case in quick else pytest.mark.slow) for case in cases]
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks) for case, marks in marked]
