"""Sessions that cross a part of a span: they run those blocks and no others, beside sessions of other parts."""

import pytest
import torch
from span_chain import TINY_BLOCKS, tiny_options

from plait.engine import SpanEngine, SpanSession, load_span_engine
from plait.errors import BadRequest
from plait.ids import SessionId
from plait.kernels import native_available
from plait.session import SamplingParams

PROMPT = (100, 101, 102, 103, 104)
PARTS = [range(6), range(2), range(1, 4), range(3, 6), range(5, 6), range(1)]


def session(number: int, blocks: range | None) -> SpanSession:
    return SpanSession(
        id=SessionId(f"{number:032x}"),
        max_tokens=40,
        prompt_tokens=len(PROMPT),
        blocks=blocks,
        sampling=SamplingParams(temperature=0.0),
    )


def outputs_of(engine: SpanEngine, parts: list[tuple[int, range, torch.Tensor | None]]) -> dict[int, object]:
    """What the prompt gives in each part, all in one step."""
    for number, blocks, hidden in parts:
        engine.open(session(number, blocks))
        engine.feed(SessionId(f"{number:032x}"), 0, PROMPT, hidden, sample_rows=1)
    outputs = {int(output.id, 16): output for output in engine.step()}
    engine.check()
    for number, _, _ in parts:
        engine.close(SessionId(f"{number:032x}"))
    return {
        number: output.hidden if output.hidden is not None else output.sampled[0].token_id
        for number, output in outputs.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_of_a_span_give_what_spans_of_their_own_give(dtype: str) -> None:
    if dtype == "bfloat16" and not native_available:
        pytest.skip("the CPU kernels are not built")
    whole = load_span_engine(tiny_options(dtype), range(TINY_BLOCKS))
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(len(PROMPT), whole.spec.hidden, generator=generator)
    parts = [(number, blocks, hidden if blocks.start else None) for number, blocks in enumerate(PARTS)]
    together = outputs_of(whole, parts)
    assert whole.load().steps_total == 1
    for number, blocks, rows in parts:
        alone = outputs_of(load_span_engine(tiny_options(dtype), blocks), [(number, blocks, rows)])
        if isinstance(together[number], int):
            assert together[number] == alone[number]
        else:
            assert torch.equal(together[number], alone[number])
    assert whole.load().kv_free_tokens == whole.load().kv_total_tokens


def test_blocks_beyond_the_span_are_refused() -> None:
    engine = load_span_engine(tiny_options("float32"), range(2, 5))
    for blocks in (range(1, 4), range(2, 6), range(3, 3), range(2, 5, 2)):
        with pytest.raises(BadRequest, match="here are 2:5"):
            engine.open(session(1, blocks))
    engine.open(session(1, None))
    engine.open(session(2, range(3, 4)))
    with pytest.raises(BadRequest, match="3:4 take hidden states"):
        engine.feed(SessionId(f"{2:032x}"), 0, PROMPT, None, sample_rows=0)
    engine.check()
