"""Resume plans, row buffers, prompt lookup, and sampling parameters on the wire."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadRequest
from plait.session import (
    Constraint,
    PromptLookup,
    RowBuffer,
    SamplingParams,
    from_wire_sampling,
    plan_resume,
    to_wire_sampling,
)


def is_possible(plan: tuple[int, ...], known: list[int], kept_from: list[int], tokens: int) -> bool:
    """Nobody is to know more than it does or than there is, the last one samples again, and all is sent on."""
    if any(own > have for own, have in zip(plan, known, strict=True)) or plan[-1] > tokens - 1:
        return False
    if max(plan) > tokens:
        return False
    return all(plan[hop] <= plan[hop + 1] or kept_from[hop] <= plan[hop + 1] for hop in range(len(plan) - 1))


@given(st.data())
def test_a_resume_plan_computes_as_little_again_as_is_possible(data: st.DataObject) -> None:
    hops = data.draw(st.integers(1, 4))
    tokens = data.draw(st.integers(1, 5))
    known = [data.draw(st.integers(0, 5)) for _ in range(hops)]
    kept_from = [data.draw(st.integers(0, have)) for have in known]
    plan = plan_resume(known, kept_from, tokens)
    assert is_possible(plan, known, kept_from, tokens)
    best = max(
        (other for other in product(range(6), repeat=hops) if is_possible(other, known, kept_from, tokens)),
        key=sum,
    )
    assert sum(plan) == sum(best)


def test_survivors_compute_nothing_again_and_the_last_hop_one_position() -> None:
    assert plan_resume([20, 0, 20, 20], [0, 0, 0, 0], 20) == (20, 0, 20, 19)
    assert plan_resume([20, 20, 20, 0], [0, 0, 0, 0], 20) == (20, 20, 20, 0)
    assert plan_resume([20, 0, 20], [12, 0, 0], 20) == (0, 0, 19)


@given(st.lists(st.tuples(st.sampled_from("acf"), st.integers(0, 40)), max_size=30))
def test_a_row_buffer_holds_what_a_list_would(things: list[tuple[str, int]]) -> None:
    buffer, start, plain = RowBuffer(), 0, list[float]()
    for number, (what, amount) in enumerate(things):
        end = start + len(plain)
        match what:
            case "a":
                added = np.full((amount % 7 + 1, 3), number, np.float32)
                buffer.append(added)
                plain += [float(number)] * len(added)
            case "c":
                if amount < start:
                    start, plain = amount, []
                else:
                    del plain[amount - start :]
                buffer.cut(amount)
            case _:
                cut = min(max(amount, start), end)
                del plain[: cut - start]
                start = cut
                buffer.forget_before(amount)
        assert (buffer.start, buffer.end) == (start, start + len(plain))
        assert buffer.held_bytes == 12 * len(plain)
        if plain:
            assert buffer.rows(start, start + len(plain))[:, 0].tolist() == plain


def test_rows_that_were_handed_out_stay_as_they_are_while_the_buffer_grows_and_forgets() -> None:
    buffer = RowBuffer()
    buffer.append(np.arange(8, dtype=np.float32).reshape(4, 2))
    view = buffer.rows(1, 3)
    before = view.copy()
    for _ in range(50):
        buffer.append(np.ones((3, 2), np.float32))
    buffer.forget_before(100)
    assert (view == before).all()


def test_a_guess_is_what_followed_the_longest_repetition() -> None:
    lookup = PromptLookup(4)
    assert lookup.guess([1, 2, 3, 4, 5], 10) == ()
    assert lookup.guess([1, 2, 3, 4, 5, 9, 2, 3], 10) == (4, 5, 9, 2)
    assert lookup.guess([1, 2, 3, 4, 5, 9, 2, 3, 4], 2) == (5, 9)
    assert lookup.guess([1, 2, 3, 4, 5, 9, 2, 3, 4], 0) == ()
    assert PromptLookup(0).guess([1, 2, 1, 2, 1, 2], 9) == ()


def test_wrong_guesses_become_shorter_and_right_ones_longer() -> None:
    lookup, text = PromptLookup(8), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2]
    lengths: list[int] = []
    for right in (0, 0, 0, 0, 1, 2, 4, 8):
        guess = lookup.guess(text, 20)
        lengths.append(len(guess))
        lookup.learn(len(guess), min(right, len(guess)))
    assert lengths == [8, 4, 2, 1, 1, 2, 4, 8]


def test_sampling_parameters_survive_the_wire() -> None:
    params = SamplingParams(
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={4: 1.5},
        max_tokens=9,
        min_tokens=3,
        stop_token_ids=[8],
        logprobs=2,
        constraint=Constraint(kind="regex", text="a+"),
    )
    wire = to_wire_sampling(params, seed=2**64 - 1, sample_index=3, end_token_ids=(2, 1))
    assert wire.stop_token_ids == (1, 2, 8)
    back = from_wire_sampling(wire)
    for name in (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "logit_bias",
        "min_tokens",
        "logprobs",
        "constraint",
    ):
        assert getattr(back, name) == getattr(params, name)
    assert back.ignore_eos
    assert (
        to_wire_sampling(
            SamplingParams(ignore_eos=True), seed=0, sample_index=0, end_token_ids=(2,)
        ).stop_token_ids
        == ()
    )


@pytest.mark.parametrize("field", ["beam_width", "best_of", "prompt_logprobs"])
def test_what_cannot_be_done_over_a_chain_is_named(field: str) -> None:
    with pytest.raises(BadRequest, match=field):
        to_wire_sampling(SamplingParams(**{field: 2}), seed=0, sample_index=0, end_token_ids=())
