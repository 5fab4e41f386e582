"""The fields by which chat completions and completions say how to sample, OpenAI's and vLLM's alike."""

from typing import Annotated, Any

from pydantic import Field

from plait.errors import BadRequest
from plait.gateway.structured import ResponseFormat, StructuredOutputs, constraint_of
from plait.gateway.wire import FirstError, WireModel
from plait.session import (
    MAX_ASKED_DRAFT_TOKENS,
    MAX_LOGPROBS,
    MAX_SAMPLES,
    MAX_STOP_STRINGS,
    MIN_REPETITION_PENALTY,
    RouteAsk,
    SamplingParams,
)

Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
StopString = Annotated[str, Field(min_length=1)]
# A token id as the key of a JSON object.
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


class StreamOptions(WireModel):
    """What else a stream should carry."""

    include_usage: bool | None = None


Word = Annotated[str, Field(min_length=1, max_length=256)]


class RouteFields(WireModel):
    """Which machines of a swarm should answer; only a swarm's server takes it."""

    mode: Word | None = None
    pick: Word | None = None
    objectives: Annotated[list[Word], FirstError(), Field(max_length=16)] | None = None
    pinned: Annotated[list[Word], FirstError(), Field(max_length=256)] | None = None
    max_hops: Annotated[int, Field(ge=1, le=4096)] | None = None
    evaluations: Annotated[int, Field(ge=1, le=100_000)] | None = None
    draft_tokens: Annotated[int, Field(ge=0, le=MAX_ASKED_DRAFT_TOKENS)] | None = None

    def ask(self) -> RouteAsk:
        """The wish of these fields."""
        return RouteAsk(
            mode=self.mode,
            pick=self.pick,
            objectives=tuple(self.objectives or ()),
            pinned=tuple(self.pinned or ()),
            max_hops=self.max_hops,
            evaluations=self.evaluations,
            draft_tokens=self.draft_tokens,
        )


class SamplingFields(WireModel):
    """Fields common to `/v1/chat/completions` and `/v1/completions`."""

    model: str | None = None
    n: Samples | None = None
    best_of: Samples | None = None
    use_beam_search: bool | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: (
        StopString | Annotated[list[StopString], FirstError(), Field(max_length=MAX_STOP_STRINGS)] | None
    ) = None
    stop_token_ids: Annotated[list[int], FirstError()] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    route: RouteFields | None = None

    @property
    def route_ask(self) -> RouteAsk | None:
        """Which machines should answer, if the request says so."""
        return None if self.route is None else self.route.ask()

    def sampling(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The sampling asked for; what was left out takes the defaults of `SamplingParams`.

        Raises:
            BadRequest: a value out of its range.
        """
        given: dict[str, Any] = {
            name: value for name in _SAME_NAME if (value := getattr(self, name)) is not None
        }
        n = self.n if self.n is not None else 1
        if self.use_beam_search:
            # As in vLLM: as many beams as answers.
            given["beam_width"] = self.best_of if self.best_of is not None else n
            given.pop("best_of", None)
        return SamplingParams(
            **given,
            max_tokens=max_tokens,
            logprobs=logprobs,
            logit_bias={int(key): bias for key, bias in (self.logit_bias or {}).items()} or None,
            constraint=constraint_of(
                self.response_format,
                self.structured_outputs or self._guided(),
            ),
        )

    def check_stream_options(self) -> None:
        """Refuse options of a stream that was not asked for, as OpenAI does."""
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options needs stream: true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise BadRequest("prompt_logprobs needs stream: false", param="prompt_logprobs")

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _guided(self) -> StructuredOutputs:
        """vLLM's older names of `structured_outputs`."""
        return StructuredOutputs.model_construct(
            json_=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
            json_object=None,
        )


_SAME_NAME = (
    *("n", "best_of", "length_penalty", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed", "min_tokens", "stop", "stop_token_ids"),
    *("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "prompt_logprobs"),
)
