import chex
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import metrics


def test_perplexity_of_equal_odds_is_their_number():
    chex.assert_trees_all_close(metrics.perplexity(100 * np.log(8), jnp.float32(100)), 8, rtol=1e-6)


def test_choices_are_compared_within_their_question():
    nll = np.array([3.0, 2.0, 9.0, 8.0, 7.0])
    question = np.array([4, 4, 7, 7, 7])
    assert metrics.choice_accuracy(nll, question, np.array([0, 1, 1, 0, 0])) == 0.5
    # By the mean over tokens the long option wins.
    tokens = np.array([2, 1, 9, 2, 2])
    assert metrics.choice_accuracy(nll, question, np.array([1, 0, 1, 0, 0]), tokens) == 1.0


def test_exact_match_leaves_case_articles_and_punctuation_aside():
    assert metrics.exact_match(["The cat.", "dog"], ["cat", "a cat"]) == 0.5
    assert metrics.exact_match(["The cat.", " dog "], ["cat", "dog"], normalize=False) == 0.5


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 + 4\n#### 1,234", "1234"), ("it is -2.5.", "-2.5"), ("7 then 12 apples", "12"), ("none", None)],
)
def test_the_last_number_is_the_answer(text, number):
    assert metrics.final_number(text) == number


def test_bleu_and_rouge_are_those_of_their_libraries():
    predictions, references = ["the cat sat on the mat", "a dog"], [["the cat sat on the mat"], ["a dog", "one dog"]]
    assert metrics.bleu(predictions, references) == pytest.approx(100)
    assert metrics.rouge_l(predictions, references) == pytest.approx(1)
    assert 0 < metrics.bleu(["the cat sat on a mat", "a dog"], references) < 100
    assert metrics.rouge_l(["the dogs", "a dog"], [["the dog"], ["a dog"]]) == pytest.approx(1)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="as many references as predictions"):
        metrics.exact_match(["a"], [])
    with pytest.raises(ValueError, match="prediction 0 has none"):
        metrics.bleu(["a"], [[]])
    with pytest.raises(ValueError, match="question 3 has not exactly one correct option"):
        metrics.choice_accuracy(np.ones(2), np.array([3, 3]), np.zeros(2))
    with pytest.raises(ValueError, match="arrays"):
        metrics.choice_accuracy(np.ones(2), np.ones(3), np.zeros(2))
