"""Offline use: shapes that vLLM users know, and the tokens of transformers."""

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import plait.model
from plait import LLM, SamplingParams
from plait.errors import BadRequest, BadSetup

TINY = Path(plait.model.__file__).parent / "tiny"
PROMPTS = (
    "def main():\n    ",
    "import os\nimport sys\n",
    "class Stack:\n",
    '"""Return the',
    "for line in ",
    "if __name__ ==",
    "    raise ValueError(",
    "try:\n    import ",
    "@property\n",
    "# This is",
    "The quick brown fox",
    "def __init__(self",
    "with open(",
    "return self.",
    "async def ",
    "from collections import",
    "x = [",
    "logging.",
    "    def test_",
    "while True:",
)


@cache
def reference_tokens(tokens: int) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([_encode(prompt)])
        output = model.generate(
            ids,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        answers.append(output[0, ids.shape[1] :].tolist())
    return answers


@cache
def llm() -> LLM:
    return LLM("tiny", dtype="float32", kv_cache_memory="64MiB", threads=1)


def _encode(prompt: str) -> list[int]:
    return list(llm().generate(prompt, SamplingParams(max_tokens=1))[0].prompt_token_ids)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_prefix_caching": False},
        {"policy": "orca"},
        {"policy": "static"},
        {"kv_cache_memory": "6MiB", "preemption": "recompute"},
        {"kv_cache_memory": "6MiB", "preemption": "swap", "swap_space": "6MiB"},
    ],
    ids=lambda options: ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults",
)
def test_greedy_text_is_that_of_transformers_for_200_tokens(options: dict[str, object]) -> None:
    tokens = 200
    with LLM(
        "tiny", dtype="float32", threads=1, max_model_len=256, **({"kv_cache_memory": "64MiB"} | options)
    ) as served:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        outputs = served.generate(PROMPTS, params)
        again = served.generate(PROMPTS, params)  # now every prompt and answer is in the prefix cache
    expected = reference_tokens(tokens)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert [list(output.outputs[0].token_ids) for output in again] == expected


def test_prompts_come_as_text_ids_or_dicts() -> None:
    params = SamplingParams(max_tokens=6, temperature=0.0)
    text = llm().generate("import os", params)[0]
    ids = list(text.prompt_token_ids)
    assert text.prompt == "import os"
    for prompt in (ids, [ids], {"prompt_token_ids": ids}, [{"prompt": "import os"}]):
        output = llm().generate(prompt, params)
        assert len(output) == 1
        assert output[0].outputs[0].token_ids == text.outputs[0].token_ids
    assert len(llm().generate(["import os", "import sys"], [params, SamplingParams(n=2)])) == 2
    with pytest.raises(BadRequest, match="2 prompts came with 1"):
        llm().generate(["a", "b"], [params])


def test_outputs_have_the_shapes_vllm_users_know() -> None:
    params = SamplingParams(n=2, temperature=1.0, seed=7, max_tokens=5, logprobs=2, prompt_logprobs=1)
    output = llm().generate("def main(", params)[0]
    assert output.finished
    assert [completion.index for completion in output.outputs] == [0, 1]
    for completion in output.outputs:
        assert completion.finish_reason in ("length", "stop")
        assert len(completion.logprobs) == len(completion.token_ids)
        for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True):
            assert token_id in position
            assert 2 <= len(position) <= 3
            assert position[token_id].logprob <= 0
        assert completion.cumulative_logprob == pytest.approx(
            sum(p[t].logprob for t, p in zip(completion.token_ids, completion.logprobs, strict=True))
        )
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_the_same_seed_gives_the_same_tokens_in_any_company() -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12)
    alone = llm().generate("class Queue", params)[0].outputs[0].token_ids
    among = llm().generate(["def f(", "class Queue", "import"], params)[1].outputs[0].token_ids
    assert alone == among


def test_beams_are_those_of_transformers() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    for prompt in PROMPTS[:5]:
        ids = torch.tensor([_encode(prompt)])
        expected = model.generate(
            ids, max_new_tokens=12, num_beams=4, num_return_sequences=4, do_sample=False, pad_token_id=0
        )[:, ids.shape[1] :]
        found = llm().generate(prompt, SamplingParams(beam_width=4, n=4, max_tokens=12, temperature=0.0))[0]
        for row, completion in zip(expected.tolist(), found.outputs, strict=True):
            assert list(completion.token_ids) == row[: len(completion.token_ids)]


def test_logits_are_those_of_transformers() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = _encode("def main():\n    return os.path.join(")
    expected = model(torch.tensor([ids])).logits[0]
    found = llm().logits(ids)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4 * expected.std()


def test_bfloat16_moves_only_what_is_nearly_a_tie() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = _encode((TINY / "MODEL_CARD.md").read_text()[:1500])
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    with LLM("tiny", dtype="bfloat16", kv_cache_memory="16MiB", threads=1) as half:
        found = half.logits(ids).log_softmax(-1)
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-3
    # One position in fifty has another favourite, for transformers' own bfloat16 too. A logit has steps of 1/16
    # there, so float32 must have preferred its own by hardly more than that.
    best, favourite = expected.max(-1).values, found.argmax(-1)
    assert (favourite == expected.argmax(-1)).float().mean() > 0.95
    assert (best - expected.gather(-1, favourite[:, None])[:, 0]).max() < 0.125


def test_a_chat_goes_through_the_template() -> None:
    output = llm().chat(
        [{"role": "user", "content": "Hello, who are you?"}], SamplingParams(max_tokens=80, temperature=0.0)
    )
    assert "tiny" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"


def test_a_bad_prompt_leaves_nothing_behind() -> None:
    with pytest.raises(BadRequest, match="context"):
        llm().generate([[100, 101], [100] * 5000], SamplingParams(max_tokens=3))
    assert llm().generate([100, 101], SamplingParams(max_tokens=3))[0].finished


def test_a_model_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match=r"config\.json"):
        LLM(str(tmp_path))
