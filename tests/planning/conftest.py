"""What the tests of planning share."""

import pytest


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    """A cache of plans of each test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
