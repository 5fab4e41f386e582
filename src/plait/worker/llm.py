"""Offline use: the same engine, driven by the caller's thread. Names and shapes are those vLLM users know."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, Self

from jaxtyping import Float
from torch import Tensor

from plait.engine import (
    EngineOptions,
    TensorParallel,
    Wishes,
    decide_options,
    resolve_model,
)
from plait.errors import BadRequest
from plait.ids import RequestId
from plait.scheduling import Preemption, StepLimits
from plait.session import (
    FinishReason,
    GenerationRequest,
    PositionLogprobs,
    RequestDelta,
    SamplingParams,
    SequenceDelta,
)
from plait.units import parse_bytes
from plait.worker.tensor_parallel import load_divided

# A script hands over all its prompts at once, and nobody else waits behind them.
OFFLINE_MAX_WAITING = 2**31

Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token at one position; `rank` 1 is the most likely one, None unknown."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One finished continuation. `logprobs` has, for each token, a map from token id to its `Logprob`."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """All that one prompt gave, continuations in order of their index (best first for beam search)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    finished: bool = True


class LLM:
    """One model on this machine, for scripts.

    `model` is `"tiny"` (shipped inside plait), a folder, or a repository id on the Hugging Face hub.
    `max_model_len` is in tokens; `kv_cache_memory` and `swap_space` are bytes or text such as `"2GiB"`.
    `tensor_parallel_size` divides the model over so many processes, which end with `close` or with this one.
    `quantization` (none, int8, int4, int4-g128) and `kv_cache_dtype` (auto, bfloat16, int8) are for plait's CPU
    kernels, and so is `packed_cache`, which keeps their form of the weights on the disk.

    Raises:
        BadSetup: the model cannot be found, read or held.
    """

    def __init__(
        self,
        model: str = "tiny",
        *,
        dtype: str = "auto",
        quantization: str = "none",
        kv_cache_dtype: str = "auto",
        device: str = "auto",
        seed: int = 0,
        max_model_len: int | None = None,
        kv_cache_memory: int | str | None = None,
        swap_space: int | str = 0,
        gpu_memory_utilization: float = 0.9,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        policy: str = "paged",
        preemption: Preemption = "auto",
        enable_prefix_caching: bool = True,
        packed_cache: bool = True,
        threads: int = 0,
        tensor_parallel_size: int = 1,
    ) -> None:
        options = EngineOptions(
            folder=resolve_model(model),
            packed_cache=packed_cache,
            max_model_tokens=max_model_len,
            swap_bytes=parse_bytes(swap_space),
            policy=policy,
            limits=StepLimits(
                step_tokens=max_num_batched_tokens,
                max_running_sequences=max_num_seqs,
                max_waiting=OFFLINE_MAX_WAITING,
                preemption=preemption,
            ),
            prefix_caching=enable_prefix_caching,
            seed=seed,
            threads=threads,
            tensor_parallel=TensorParallel(size=tensor_parallel_size),
        )
        wishes = Wishes(
            device=device,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_bytes=None if kv_cache_memory is None else parse_bytes(kv_cache_memory),
            gpu_memory_fraction=gpu_memory_utilization,
        )
        self._load(decide_options(options, wishes))

    @classmethod
    def from_options(cls, options: EngineOptions) -> Self:
        """An LLM on an engine that is decided already."""
        llm = cls.__new__(cls)
        llm._load(options)
        return llm

    def _load(self, options: EngineOptions) -> None:
        with ExitStack() as ranks:
            self._engine = load_divided(options, ranks)
            self._ranks = ranks.pop_all()
        self._request_numbers = count()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights and the cache."""
        del self._engine
        self._ranks.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt (text, token ids, or `{"prompt_token_ids": ...}`), batched, in the order given.

        Raises:
            BadRequest: a prompt or its parameters cannot be served; nothing was generated.
        """
        listed = [_as_prompt(prompt) for prompt in _as_list(prompts)]
        params = self._params_for(listed, sampling_params)
        encode = self._engine.tokenizer.encode
        return self._answer(
            [
                _Asked(prompt, tuple(encode(prompt)), sampling)
                if isinstance(prompt, str)
                else _Asked(None, tuple(prompt), sampling)
                for prompt, sampling in zip(listed, params, strict=True)
            ]
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> RequestOutput:
        """Answer a conversation through the model's own chat template."""
        token_ids = self._engine.tokenizer.encode_chat(messages, tools=tools, add_generation_prompt=True)
        asked = _Asked(None, tuple(token_ids), sampling_params or SamplingParams(), is_chat=True)
        return self._answer([asked])[0]

    def logits(self, token_ids: Sequence[int]) -> Float[Tensor, "tokens vocab"]:
        """The model's logits at every position of `token_ids`, float32, through the engine's own paged path."""
        return self._engine.prompt_logits(token_ids)

    def _params_for(
        self, prompts: Sequence[object], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> Sequence[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise BadRequest(
                f"{len(prompts)} prompts came with {len(params)} sampling params; give one for all, or one for each",
                param="sampling_params",
            )
        return params

    def _answer(self, asked: Sequence["_Asked"]) -> list[RequestOutput]:
        engine = self._engine
        requests = [
            GenerationRequest(
                id=RequestId(f"{next(self._request_numbers)}"),
                prompt_token_ids=item.token_ids,
                sampling=item.sampling,
                continues_text=not item.is_chat,
            )
            for item in asked
        ]
        deltas: dict[RequestId, list[RequestDelta]] = {request.id: [] for request in requests}
        try:
            for request in requests:
                engine.add(request)
            while engine.has_work:
                for delta in engine.step():
                    deltas[delta.request_id].append(delta)
                for _, failure in engine.take_failures():
                    raise failure
        except BaseException:
            engine.abort_running()
            raise
        finally:
            for request in requests:
                engine.abort(request.id)
        return [
            self._output(request, item.prompt, deltas[request.id])
            for item, request in zip(asked, requests, strict=True)
        ]

    def _output(
        self, request: GenerationRequest, prompt: str | None, deltas: Sequence[RequestDelta]
    ) -> RequestOutput:
        parts: dict[int, list[SequenceDelta]] = {}
        for delta in deltas:
            for part in delta.sequences:
                parts.setdefault(part.index, []).append(part)
        prompt_logprobs = next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs), None)
        return RequestOutput(
            request_id=request.id,
            prompt=prompt,
            prompt_token_ids=request.prompt_token_ids,
            prompt_logprobs=None
            if prompt_logprobs is None
            else [None if position is None else self._by_token(position) for position in prompt_logprobs],
            outputs=[self._completion(index, parts[index]) for index in sorted(parts)],
            num_cached_tokens=deltas[-1].cached_tokens,
        )

    def _completion(self, index: int, parts: Sequence[SequenceDelta]) -> CompletionOutput:
        positions = [position for part in parts for position in part.logprobs or ()]
        return CompletionOutput(
            index=index,
            text="".join(part.text for part in parts),
            token_ids=tuple(token_id for part in parts for token_id in part.token_ids),
            cumulative_logprob=sum(position.chosen.logprob for position in positions) if positions else None,
            logprobs=[self._by_token(position) for position in positions] if positions else None,
            finish_reason=parts[-1].finish_reason,
            stop_reason=parts[-1].stop_reason,
        )

    def _by_token(self, position: PositionLogprobs) -> dict[int, Logprob]:
        by_token = {
            token.token_id: Logprob(token.logprob, rank, self._engine.tokenizer.decode([token.token_id]))
            for rank, token in enumerate(position.top, start=1)
        }
        chosen = position.chosen
        if chosen.token_id not in by_token:
            text = self._engine.tokenizer.decode([chosen.token_id])
            by_token[chosen.token_id] = Logprob(chosen.logprob, None, text)
        return by_token


@dataclass(frozen=True, slots=True)
class _Asked:
    """One prompt, encoded."""

    prompt: str | None
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    is_chat: bool = False


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt may come alone; a list of ints is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # pyright: ignore[reportReturnType] - narrowed by the line above
    return prompts  # pyright: ignore[reportReturnType] - not a single prompt


def _as_prompt(prompt: Prompt) -> str | Sequence[int]:
    if not isinstance(prompt, Mapping):
        return prompt
    if "prompt_token_ids" in prompt:
        return prompt["prompt_token_ids"]
    if "prompt" in prompt:
        return prompt["prompt"]
    raise BadRequest("a prompt given as a dict needs 'prompt' or 'prompt_token_ids'", param="prompts")
