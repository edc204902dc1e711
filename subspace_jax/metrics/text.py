"""Metrics of language models, from likelihoods and from texts."""

import re
import string
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def perplexity(total_nll: jax.typing.ArrayLike, num_tokens: jax.typing.ArrayLike) -> jax.Array:
    """``exp(total_nll / num_tokens)``, from a sum of negative log-likelihoods in nats and the number of tokens."""
    return jnp.exp(jnp.asarray(total_nll) / jnp.asarray(num_tokens))


def choice_accuracy(
    nll: np.ndarray, question: np.ndarray, is_answer: np.ndarray, num_tokens: np.ndarray | None = None
) -> float:
    """Returns the fraction of questions whose correct option is the most likely.

    Args:
      nll: Negative log-likelihood of each option given its prompt, ``[rows]``.
      question: Question of each row, ``[rows]`` integers.
      is_answer: 1 for the correct option, ``[rows]``.
      num_tokens: Tokens of each option, ``[rows]``: options are then compared by the mean over their tokens, which
        does not penalize long options.

    Raises:
      ValueError: There is no row, shapes differ, or a question has not exactly one correct option.
    """
    columns = {"nll": nll, "question": question, "is_answer": is_answer}
    columns |= {} if num_tokens is None else {"num_tokens": num_tokens}
    columns = {name: np.asarray(x) for name, x in columns.items()}
    shapes = {name: x.shape for name, x in columns.items()}
    if len(set(shapes.values())) > 1 or len(columns["nll"].shape) != 1 or not len(columns["nll"]):
        raise ValueError(f"expected arrays [rows] of one length, at least 1, got {shapes}")
    score = columns["nll"].astype(np.float64) / columns.get("num_tokens", 1)
    numbers, row = np.unique(columns["question"], return_inverse=True)
    right = np.bincount(row, columns["is_answer"] > 0)
    if np.any(right != 1):
        raise ValueError(f"is_answer: question {numbers[np.argmax(right != 1)]} has not exactly one correct option")
    best = np.full(len(numbers), np.inf)
    np.minimum.at(best, row, score)
    answer = np.empty(len(numbers))
    chosen = columns["is_answer"] > 0
    answer[row[chosen]] = score[chosen]
    return float(np.mean(answer <= best))


def exact_match(predictions: Sequence[str], references: Sequence[str], *, normalize: bool = True) -> float:
    """Returns the fraction of predictions that equal their reference.

    Args:
      predictions: Texts.
      references: As many texts.
      normalize: Whether case, punctuation, articles and white space are ignored, as in SQuAD (arXiv 1606.05250).

    Raises:
      ValueError: There is none, or the numbers differ.
    """
    _check_pairs(predictions, references)
    clean = _normalized if normalize else str.strip
    return float(np.mean([clean(p) == clean(r) for p, r in zip(predictions, references, strict=True)]))


def _normalized(text: str) -> str:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def final_number(text: str) -> str | None:
    """The answer of a GSM8K solution (arXiv 2110.14168): what follows ``####``, else the last number, or None."""
    marked = re.search(r"####\s*(-?[\d,.]*\d)", text)
    found = [marked[1]] if marked else re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[-1].replace(",", "") if found else None


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU by sacrebleu, 0 to 100.

    Args:
      predictions: Texts.
      references: One or more texts for each of them; their number may differ.

    Raises:
      ValueError: There is none, the numbers differ, or a prediction has no reference.
      ImportError: The extra ``text`` is missing.
    """
    _check_pairs(predictions, references)
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError('BLEU needs sacrebleu: pip install "subspace-jax[text]"') from error
    # sacrebleu takes one list per position among the references, None where a prediction has fewer.
    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(predictions), streams).score)


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L F-measure, 0 to 1, with stemming, the best over the references of each prediction.

    Args:
      predictions: Texts.
      references: One or more texts for each of them.

    Raises:
      ValueError: There is none, the numbers differ, or a prediction has no reference.
      ImportError: The extra ``text`` is missing.
    """
    _check_pairs(predictions, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError('ROUGE needs rouge-score: pip install "subspace-jax[text]"') from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(predictions, references, strict=True)
    return float(np.mean([max(scorer.score(r, p)["rougeL"].fmeasure for r in own) for p, own in pairs]))


def _check_pairs(predictions: Sequence[str], references: Sequence) -> None:
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(
            f"expected as many references as predictions, at least one, got {len(references)} and {len(predictions)}"
        )
    for number, own in enumerate(references):
        if not isinstance(own, str) and not len(own):
            raise ValueError(f"references: prediction {number} has none")
