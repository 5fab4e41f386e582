"""vLLM's CPU back end as `driver.py` wants it: its offline engine, without HTTP and without prefix caching."""

from collections.abc import Sequence
from typing import Any

import vllm
from driver import drive
from vllm.inputs import TokensPrompt


class VllmEngine:
    """Settings are those of `vllm.LLM`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._engine = vllm.LLM(enable_prefix_caching=False, **settings).llm_engine
        self._tokens: dict[str, int] = {}
        self._added = 0
        self._numbers: dict[str, int] = {}

    def facts(self) -> dict[str, Any]:
        return {"version": f"vllm {vllm.__version__}"}

    def add(self, request: int, prompt: Sequence[int], output_tokens: int) -> None:
        self._added += 1
        id = str(self._added)
        self._numbers[id] = request
        parameters = vllm.SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        self._engine.add_request(id, TokensPrompt(prompt_token_ids=list(prompt)), parameters)

    def step(self) -> Sequence[int]:
        came: list[int] = []
        for output in self._engine.step():
            id = output.request_id
            tokens = len(output.outputs[0].token_ids)  # all so far
            came += [self._numbers[id]] * (tokens - self._tokens.get(id, 0))
            self._tokens[id] = tokens
        return came

    def has_work(self) -> bool:
        return self._engine.has_unfinished_requests()

    def forget(self) -> None:
        self._engine.abort_request(list(self._numbers))
        self._numbers.clear()
        self._tokens.clear()

    def kernel_s(self) -> float | None:
        return None


if __name__ == "__main__":
    drive(VllmEngine)
