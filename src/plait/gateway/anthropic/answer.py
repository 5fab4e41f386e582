"""An answer as the Messages API writes it: content blocks that grow, and an event for each step of it.

message_start
for each block   content_block_start, content_block_delta ..., content_block_stop
message_delta    (why it stopped, and how many tokens it took)
message_stop
"""

import json
from typing import Any, Literal, assert_never, cast

from plait.gateway.turn import ChoiceEnd, TextDelta, ToolCallArguments, ToolCallStart, TurnEnd, TurnEvent

Event = dict[str, Any]
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class Answer:
    """Folds the events of a turn into a message; `message` is complete after `TurnEnd`."""

    def __init__(self, id: str, model: str, prompt_tokens: int, *, fills_context: bool) -> None:
        """`fills_context`: not max_tokens but the model's context ends an answer that goes on."""
        self._blocks: list[dict[str, Any]] = []
        self._open = False
        self._arguments = ""
        self._fills_context = fills_context
        self.message: dict[str, Any] = {
            "id": id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": self._blocks,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(prompt_tokens, cached_tokens=0, completion_tokens=0),
        }

    def begin(self) -> list[Event]:
        """The event before anything is generated."""
        return [{"type": "message_start", "message": {**self.message, "content": []}}]

    def on(self, event: TurnEvent) -> list[Event]:
        """Take one event of the turn."""
        match event:
            case TextDelta(text=text):
                return self._on_text(text)
            case ToolCallStart(call_id=call_id, name=name):
                id = "toolu_" + call_id.removeprefix("call_")
                return self._end_block() + self._begin_block(
                    {"type": "tool_use", "id": id, "name": name, "input": {}}
                )
            case ToolCallArguments(fragment=fragment):
                self._arguments += fragment
                return [self._delta({"type": "input_json_delta", "partial_json": fragment})]
            case ChoiceEnd():
                self.message["stop_reason"] = self._stop_reason(event)
                if self.message["stop_reason"] == "stop_sequence":
                    self.message["stop_sequence"] = event.stop_reason
                return self._end_block()
            case TurnEnd():
                return self._on_turn_end(event)
            case _:
                assert_never(event)

    def _on_text(self, text: str) -> list[Event]:
        if not text:
            return []
        events: list[Event] = []
        if not self._open or self._blocks[-1]["type"] != "text":
            events += self._end_block() + self._begin_block({"type": "text", "text": ""})
        self._blocks[-1]["text"] += text
        return [*events, self._delta({"type": "text_delta", "text": text})]

    def _on_turn_end(self, end: TurnEnd) -> list[Event]:
        usage = _usage(end.prompt_tokens, end.cached_tokens, end.completion_tokens)
        self.message["usage"] = usage
        delta = {name: self.message[name] for name in ("stop_reason", "stop_sequence")}
        return [{"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]

    def _stop_reason(self, end: ChoiceEnd) -> StopReason:
        match end.finish_reason:
            case "tool_calls":
                return "tool_use"
            case "length":
                return "model_context_window_exceeded" if self._fills_context else "max_tokens"
            case "stop":
                return "stop_sequence" if isinstance(end.stop_reason, str) else "end_turn"

    def _begin_block(self, block: dict[str, Any]) -> list[Event]:
        self._blocks.append(block)
        self._open, self._arguments = True, ""
        return [
            {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)},
        ]

    def _end_block(self) -> list[Event]:
        if not self._open:
            return []
        self._open = False
        if self._blocks[-1]["type"] == "tool_use":
            self._blocks[-1]["input"] = _input(self._arguments)
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}


def _usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Token counts; unlike OpenAI's, `input_tokens` are only those that were not cached."""
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": completion_tokens,
    }


def _input(arguments: str) -> dict[str, Any]:
    """Arguments as the object a block must have.

    What a model wrote that is no JSON object, or was cut short, is wrapped the way Anthropic's page on
    fine-grained tool streaming tells clients to pass it back.
    """
    try:
        value: object = json.loads(arguments, parse_constant=_refuse, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        value = None
    return cast(dict[str, Any], value) if isinstance(value, dict) else {"INVALID_JSON": arguments}


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is out of range")
    return value
