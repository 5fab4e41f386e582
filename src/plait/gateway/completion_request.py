"""The body of `/v1/completions`, and what it asks the engine for."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from plait.errors import BadRequest
from plait.gateway.sampling_fields import SamplingFields
from plait.gateway.wire import FirstError
from plait.session import SamplingParams

# OpenAI's default for this endpoint.
DEFAULT_MAX_TOKENS = 16

TokenIds = Annotated[list[int], FirstError()]


def _prompt_kind(prompt: Any) -> str | None:
    """Tell the four forms apart by their first item, so that only one is checked item by item."""
    if isinstance(prompt, str):
        return "text"
    if not isinstance(prompt, list) or not prompt:
        return None
    first: object = prompt[0]  # pyright: ignore[reportUnknownVariableType] - the items are checked afterwards
    if isinstance(first, str):
        return "texts"
    return "token_id_lists" if isinstance(first, list) else "token_ids"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], FirstError(), Tag("texts")]
    | Annotated[TokenIds, Tag("token_ids")]
    | Annotated[list[TokenIds], FirstError(), Tag("token_id_lists")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a string, token ids, or a list of one of them, not empty",
    ),
]


class CompletionRequest(SamplingFields):
    """The body of `/v1/completions`: OpenAI's fields, and vLLM's beyond them."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, always as a list."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [prompt]  # pyright: ignore[reportReturnType] - the items are of one type, by `_prompt_kind`
        return prompt  # pyright: ignore[reportReturnType] - see above

    @property
    def prompt_only(self) -> bool:
        """`max_tokens: 0` with `echo`: only the prompt and its log-probabilities are wanted."""
        return bool(self.echo) and self.max_tokens == 0

    def sampling_params(self) -> SamplingParams:
        """The sampling asked for, of each prompt.

        Raises:
            BadRequest: something that this server does not do, or values that do not fit together.
        """
        self.check_stream_options()
        if self.suffix:
            raise BadRequest("suffix is not served: this model only continues text", param="suffix")
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        if self.prompt_only:
            # The engine always generates; the one token is dropped.
            max_tokens = 1
        sampling = self.sampling(max_tokens=max_tokens, logprobs=self.logprobs)
        if self.echo and self.logprobs is not None and sampling.prompt_logprobs is None:
            sampling = self.model_copy(update={"prompt_logprobs": self.logprobs}).sampling(
                max_tokens=max_tokens, logprobs=self.logprobs
            )
        return sampling
