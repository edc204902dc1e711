import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_jax import data
from subspace_jax.data import text

TOKENIZER = text.ByteTokenizer()
BOS, EOS, PAD = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id


def texts_of(rows):
    """Every segment: inputs, labels, weights and positions."""
    for r in range(len(rows["inputs"])):
        ids = rows["segment_ids"][r]
        for segment in range(1, ids.max() + 1):
            own = ids == segment
            yield tuple(rows[name][r][own].tolist() for name in ("inputs", "labels", "weights", "positions"))


def test_only_the_completion_and_the_end_are_learnt():
    tokens, learnt = text.encode(text.Completion("ab", "c"), TOKENIZER)
    assert tokens.tolist() == [BOS, 97, 98, 99, EOS]
    assert learnt.tolist() == [False, False, False, True, True]


def test_padded_rows_ask_for_the_next_token():
    rows = text.pad_rows([text.Completion("ab", "c"), text.Completion("", "d")], TOKENIZER, 6)
    assert rows["inputs"].tolist() == [[BOS, 97, 98, 99, PAD, PAD], [BOS, 100, PAD, PAD, PAD, PAD]]
    assert rows["labels"].tolist() == [[97, 98, 99, EOS, PAD, PAD], [100, EOS, PAD, PAD, PAD, PAD]]
    assert rows["weights"].tolist() == [[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert rows["segment_ids"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert {name: x.dtype.name for name, x in rows.items()} == {
        "inputs": "int32",
        "labels": "int32",
        "weights": "float32",
        "segment_ids": "int32",
        "positions": "int32",
    }


examples = st.lists(
    st.builds(text.Completion, st.text("ab", max_size=9), st.text("cd", min_size=1, max_size=30)), min_size=1
)


@settings(max_examples=50, deadline=None)
@given(examples, st.integers(1, 24))
def test_packing_loses_and_doubles_no_token(sample, length):
    rows = text.pack_rows(sample, TOKENIZER, length)
    learnt = lambda labels, weights: [t for t, w in zip(labels, weights, strict=True) if w]  # noqa: E731
    got = sorted(itertools.chain(*(learnt(labels, weights) for _, labels, weights, _ in texts_of(rows))))
    assert got == sorted(itertools.chain(*(e.completion.encode() for e in sample), [EOS] * len(sample)))
    for inputs, labels, _, positions in texts_of(rows):
        assert positions == list(range(len(inputs)))
        assert labels[:-1] == inputs[1:]
    filling = rows["segment_ids"] == 0
    assert not rows["weights"][filling].any()


@settings(max_examples=30, deadline=None)
@given(examples, st.integers(45, 90))
def test_texts_that_fit_stay_whole_and_rows_are_half_full(sample, length):
    rows = text.pack_rows(sample, TOKENIZER, length, truncation="refuse")
    got = sorted(bytes(t for t in inputs if t < 256) for inputs, *_ in texts_of(rows))
    assert got == sorted((e.prompt + e.completion).encode() for e in sample)
    # Of any two rows, the first text of the later one did not fit into the earlier one.
    used = np.sum(rows["segment_ids"] > 0, axis=1)
    assert len(used) == 1 or np.mean(used) > length / 2


def test_longer_texts_are_split_cut_or_refused():
    sample = [text.Completion("", "abcdefgh")]
    assert len(text.pack_rows(sample, TOKENIZER, 4)["inputs"]) == 3
    cut = text.pack_rows(sample, TOKENIZER, 4, truncation="cut")
    assert cut["labels"].tolist() == [[97, 98, 99, 100]]
    with pytest.raises(ValueError, match="example 0: 9 tokens, a row has 4"):
        text.pack_rows(sample, TOKENIZER, 4, truncation="refuse")
    with pytest.raises(ValueError, match="example 0: 9 tokens, a row has 4"):
        text.pad_rows(sample, TOKENIZER, 4)


def test_replies_that_a_split_parts_from_their_prompts_are_reported(caplog):
    sample = [text.Completion("a prompt", "ab"), text.Completion("", "abcdefgh")]
    text.pack_rows(sample, TOKENIZER, 4)
    assert (
        "2 of 2 examples are longer than a row of 4 tokens and were split; 2 of their pieces have no loss"
        in caplog.text
    )
    caplog.clear()
    text.pack_rows(sample[1:], TOKENIZER, 4)
    assert not caplog.text


def test_options_have_a_row_each():
    rows = text.choice_rows([text.Choice("p", ("a", "b"), 1), text.Choice("q", ("c",), 0)], TOKENIZER, 8)
    assert rows["question"].tolist() == [0, 0, 1]
    assert rows["option"].tolist() == [0, 1, 0]
    assert rows["is_answer"].tolist() == [0, 1, 1]
    assert rows["inputs"][:, 1:3].tolist() == [[112, 97], [112, 98], [113, 99]]


def test_batches_of_rows_go_on_where_they_stopped():
    rows = text.pack_rows([text.Completion("", "abc" * n) for n in range(1, 30)], TOKENIZER, 32)
    whole = [next(it) for it in [data.train_batches(rows, batch_size=4, seed=1)] for _ in range(9)]
    first = data.train_batches(rows, batch_size=4, seed=1)
    for _ in range(4):
        next(first)
    again = data.train_batches(rows, batch_size=4, seed=1)
    again.set_state(first.get_state())
    for batch in whole[4:]:
        got = next(again)
        for name, values in batch.items():
            np.testing.assert_array_equal(got[name], values)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: text.pack_rows([], TOKENIZER, 8), "examples: no token has a loss"),
        (lambda: text.pack_rows([text.Completion("", "a")], TOKENIZER, 0), "length: expected at least 1"),
        (lambda: text.pack_rows([text.Completion("", "a")], TOKENIZER, 8, truncation="drop"), "truncation: expected"),
        (lambda: text.choice_rows([text.Choice("p", ("a",), 1)], TOKENIZER, 8), "question 0: label 1 is none of its 1"),
    ],
)
def test_bad_input_is_named(run, message):
    with pytest.raises(ValueError, match=message):
        run()
