"""The dialects of Django's catalogues."""

import importlib.util

import pytest

from subspace_jax.data import text
from subspace_jax.data.text.dialects import SPANISH, _catalogue

needs_django = pytest.mark.skipif(importlib.util.find_spec("django") is None, reason="Django is not installed")


@needs_django
def test_dialects_have_the_same_messages_on_one_side_of_the_split():
    train, held = (text.dialects(split=split) for split in ("train", "validation"))
    assert len(train) > 3000
    assert 0.05 < len(held) / len(train) < 0.15

    def messages(examples):
        return {example.prompt.partition(": ")[2] for example in examples}

    assert not messages(train) & messages(held)
    assert {example.domain for example in held} == set(SPANISH)
    assert ("es_AR: user = ", "usuario") in train + held
    assert len(set(train)) == len(train)


def test_dialects_name_the_extra_that_has_django(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _catalogue.cache_clear()
    with pytest.raises(ImportError, match=r"subspace-jax\[real\]"):
        text.dialects()


@needs_django
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split: expected 'train' or 'validation', got 'test'"),
        ({"locales": "es"}, "locales: expected names in a list"),
        ({"locales": ["es_XX"]}, "locales: Django has no locale 'es_XX'"),
    ],
)
def test_dialects_refuse_unknown_names(options, message):
    with pytest.raises(ValueError, match=message):
        text.dialects(**options)
