import pytest

from subspace_jax.data import text


@pytest.fixture(scope="module")
def corpus():
    return text.docstrings(("json", "email")), text.docstrings(("json", "email"), "validation")


def test_docstrings_are_prose_and_splits_share_none(corpus):
    train, validation = corpus
    assert len(train) > 50
    assert len(validation) > 5
    assert not set(train) & set(validation)
    assert all(len(t) >= 80 for t in train)
    assert any("JSON" in t for t in train)


def test_the_same_packages_give_the_same_texts(corpus):
    assert text.docstrings(["json", "email"]) == corpus[0]


def test_unknown_packages_and_splits_are_refused():
    with pytest.raises(ValueError, match="'no_such_package' is no installed package"):
        text.docstrings(["no_such_package"])
    with pytest.raises(ValueError, match="expected names in a list, got 'json'"):
        text.docstrings("json")
    with pytest.raises(ValueError, match="expected 'train' or 'validation', got 'test'"):
        text.docstrings(["json"], "test")


def test_summaries_of_functions_follow_their_signatures():
    train, validation = (text.function_summaries(("json", "email"), split) for split in ("train", "validation"))
    assert any(x.prompt.startswith("loads(s, *, cls=None") and "Deserialize" in x.completion for x in train)
    assert len(validation) > 3
    assert not set(train) & set(validation)
    assert all(x.prompt.endswith("): ") and 20 <= len(x.completion) <= 200 for x in train)
