import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_jax.data import text

EXAMPLES = [text.Completion("q", str(i)) for i in range(200)]


def test_hold_out_gives_the_share_that_is_asked_for_in_the_order_given():
    train, held = text.hold_out(EXAMPLES, 0.1)
    assert len(held) == 20
    assert sorted(train + held, key=EXAMPLES.index) == EXAMPLES
    assert [train, held] == [sorted(part, key=EXAMPLES.index) for part in (train, held)]


def test_hold_out_depends_on_the_seed_and_not_on_the_order():
    held = text.hold_out(EXAMPLES, 0.1, seed=3)[1]
    assert set(text.hold_out(EXAMPLES[::-1], 0.1, seed=3)[1]) == set(held)
    assert set(text.hold_out(EXAMPLES, 0.1, seed=4)[1]) != set(held)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1), st.integers(0, 99))
def test_hold_out_has_equal_examples_on_one_side(letters, seed):
    examples = [text.Completion("", letter) for letter in letters]
    if len(set(letters)) == 1:
        with pytest.raises(ValueError, match=r"holdout: a share of .* of 1 different examples leaves none"):
            text.hold_out(examples, 0.3, seed=seed)
        return
    train, held = text.hold_out(examples, 0.3, seed=seed)
    assert not set(train) & set(held)
    assert len(train) + len(held) == len(examples)


def test_hold_out_compares_conversations_without_their_places():
    say = lambda content, line: text.Conversation(({"role": "user", "content": content},), None, f"line {line}")  # noqa: E731
    chats = [say(str(i % 5), i) for i in range(10)]
    train, held = text.hold_out(chats, 0.2)
    assert len(held) == 2
    assert len({chat.messages[0]["content"] for chat in held}) == 1
    assert len(train) == 8


def test_hold_out_tells_of_repeats_where_none_is_left():
    few = [text.Completion("", "a")] * 30 + [text.Completion("", "b")]
    assert text.count_different(few) == 2
    with pytest.raises(ValueError, match="of 2 different examples leaves none to train on; 29 more repeat them, and"):
        text.hold_out(few, 0.9)
    with pytest.raises(ValueError, match=r"of 2 different examples leaves none to train on$"):
        text.hold_out(few[-2:], 0.9)


@pytest.mark.parametrize("share", [0, 1, -0.5, float("nan")])
def test_hold_out_refuses_shares_out_of_range(share):
    with pytest.raises(ValueError, match="holdout: expected a share above 0 and below 1"):
        text.hold_out(EXAMPLES, share)
