"""`/tokenize` and `/detokenize`, in vLLM's shapes."""

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from plait.errors import BadRequest
from plait.gateway.chat_request import ChatMessage, ChatRequest, Tool
from plait.gateway.disconnect import unless_disconnected
from plait.gateway.front_door import Door
from plait.gateway.json_body import JsonRoute
from plait.gateway.openai_documents import json_responses
from plait.gateway.openai_json import json_response
from plait.gateway.prompt import off_loop_if_long, text_prompt
from plait.gateway.turn import turn_prompt
from plait.gateway.wire import FirstError, WireModel

router = APIRouter(route_class=JsonRoute, tags=["tokens"])


class TokenizeRequest(WireModel):
    """A text (`prompt`) or a chat (`messages`) to turn into token ids."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], FirstError(), Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(WireModel):
    """Token ids to turn into text."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], FirstError()]


@router.post("/tokenize", responses=json_responses("Token ids."))
async def tokenize(body: TokenizeRequest, request: Request, door: Door) -> Response:
    """Turn a text or a chat into token ids."""
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("give either a prompt or messages", param="prompt")
    model = await unless_disconnected(request, door.ready_model(body.model))
    if body.messages is not None:
        chat = ChatRequest(
            messages=body.messages,
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        token_ids = await turn_prompt(door, chat.turn())
    else:
        special = body.add_special_tokens is not False
        token_ids = await text_prompt(model, body.prompt or "", add_special_tokens=special)
    answer: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": model.max_model_tokens,
        "tokens": list(token_ids),
        "token_strs": None,
    }
    if body.return_token_strs:
        answer["token_strs"] = [model.tokenizer.token_content(token_id) for token_id in token_ids]
    return json_response(answer)


@router.post("/detokenize", responses=json_responses("The text."))
async def detokenize(body: DetokenizeRequest, request: Request, door: Door) -> Response:
    """Turn token ids into text."""
    model = await unless_disconnected(request, door.ready_model(body.model))
    limit = model.tokenizer.vocab_tokens
    if body.tokens and max(body.tokens) >= limit:
        raise BadRequest(
            f"tokens has {max(body.tokens)}; this tokenizer's ids end at {limit - 1}", param="tokens"
        )
    text = await off_loop_if_long(
        lambda: model.tokenizer.decode(body.tokens, skip_special_tokens=False), len(body.tokens)
    )
    return json_response({"prompt": text})
