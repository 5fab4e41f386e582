"""An answer as the Responses API writes it: a list of items that grows, and an event for each step of it.

response.created, response.in_progress
for each item   output_item.added
    a message     content_part.added, output_text.delta ..., output_text.done, content_part.done
    a call        function_call_arguments.delta ..., function_call_arguments.done
                output_item.done
response.completed | response.incomplete | response.failed
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, assert_never

from plait.gateway.errors import ErrorReply
from plait.gateway.turn import ChoiceEnd, TextDelta, ToolCallArguments, ToolCallStart, TurnEnd, TurnEvent
from plait.session import PositionLogprobs

Event = dict[str, Any]
Item = dict[str, Any]
WriteLogprobs = Callable[[Sequence[PositionLogprobs]], list[dict[str, Any]]]


class Answer:
    """Folds the events of a turn into a response; `response` is the object as it stands."""

    def __init__(self, response: dict[str, Any], write_logprobs: WriteLogprobs) -> None:
        self.response = response
        self._write_logprobs = write_logprobs
        self._item: Item | None = None
        self._waiting_logprobs: list[dict[str, Any]] = []
        """Of tokens whose text has not come yet."""
        self._events_sent = 0
        self._finish_reason = "stop"

    @property
    def _output(self) -> list[Item]:
        return self.response["output"]

    def begin(self) -> list[Event]:
        """The events before anything is generated."""
        return [
            self._event("response.created", response=dict(self.response)),
            self._event("response.in_progress", response=dict(self.response)),
        ]

    def on(self, event: TurnEvent) -> list[Event]:
        """Take one event of the turn."""
        match event:
            case TextDelta(text=text, logprobs=logprobs):
                return self._on_text(text, logprobs)
            case ToolCallStart(call_id=call_id, name=name):
                self._waiting_logprobs = []
                call = {"call_id": call_id, "name": name, "arguments": ""}
                return self._end_item("completed") + self._begin_item("function_call", "fc", call)
            case ToolCallArguments(fragment=fragment):
                return self._on_arguments(fragment)
            case ChoiceEnd(finish_reason=finish_reason):
                return self._on_choice_end(finish_reason)
            case TurnEnd():
                return self._on_turn_end(event)
            case _:
                assert_never(event)

    def fail(self, reply: ErrorReply) -> list[Event]:
        """End the response with an error, items left as they are."""
        code = "rate_limit_exceeded" if reply.status == 429 else "server_error"
        self.response.update(status="failed", error={"code": code, "message": reply.message})
        return [self._event("response.failed", response=dict(self.response))]

    def _on_text(self, text: str, logprobs: Sequence[PositionLogprobs] | None) -> list[Event]:
        in_message = self._item is not None and self._item["type"] == "message"
        if logprobs:
            self._waiting_logprobs += self._write_logprobs(logprobs)
        if not text and not (in_message and self._waiting_logprobs):
            return []
        events: list[Event] = [] if in_message else self._end_item("completed") + self._begin_message()
        written, self._waiting_logprobs = self._waiting_logprobs, []
        assert self._item is not None
        part = self._item["content"][0]
        part["text"] += text
        part["logprobs"] += written
        place = self._place()
        events.append(self._event("response.output_text.delta", **place, delta=text, logprobs=written))
        return events

    def _on_arguments(self, fragment: str) -> list[Event]:
        assert self._item is not None and self._item["type"] == "function_call"
        self._item["arguments"] += fragment
        place = self._place()
        return [self._event("response.function_call_arguments.delta", **place, delta=fragment)]

    def _on_choice_end(self, finish_reason: str) -> list[Event]:
        self._finish_reason = finish_reason
        events: list[Event] = []
        if not self._output:
            events += self._begin_message()
        return events + self._end_item("incomplete" if finish_reason == "length" else "completed")

    def _on_turn_end(self, end: TurnEnd) -> list[Event]:
        self.response["usage"] = {
            "input_tokens": end.prompt_tokens,
            "input_tokens_details": {"cached_tokens": end.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": end.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": end.prompt_tokens + end.completion_tokens,
        }
        status = "completed"
        if self._finish_reason == "length":
            status = "incomplete"
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response["status"] = status
        return [self._event(f"response.{status}", response=dict(self.response))]

    def _begin_message(self) -> list[Event]:
        events = self._begin_item("message", "msg", {"role": "assistant", "content": []})
        assert self._item is not None
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._item["content"].append(part)
        events.append(self._event("response.content_part.added", **self._place(), part=_copy_of_part(part)))
        return events

    def _begin_item(self, kind: str, id_prefix: str, fields: Mapping[str, Any]) -> list[Event]:
        self._item = {
            "type": kind,
            "id": f"{id_prefix}_{uuid.uuid4().hex}",
            "status": "in_progress",
            **fields,
        }
        self._output.append(self._item)
        index = len(self._output) - 1
        return [self._event("response.output_item.added", output_index=index, item=_copy_of_item(self._item))]

    def _end_item(self, status: str) -> list[Event]:
        item, place = self._item, self._place()
        if item is None:
            return []
        item["status"] = status
        events: list[Event] = []
        if item["type"] == "message":
            part = _copy_of_part(item["content"][0])
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            events.append(self._event("response.output_text.done", **place, **done))
            events.append(self._event("response.content_part.done", **place, part=part))
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._event("response.function_call_arguments.done", **place, **done))
        index = place["output_index"]
        events.append(self._event("response.output_item.done", output_index=index, item=_copy_of_item(item)))
        self._item = None
        return events

    def _place(self) -> dict[str, Any]:
        """Where the open item is."""
        if self._item is None:
            return {}
        place: dict[str, Any] = {"item_id": self._item["id"], "output_index": len(self._output) - 1}
        return {**place, "content_index": 0} if self._item["type"] == "message" else place

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._events_sent, **fields}
        self._events_sent += 1
        return event


def _copy_of_part(part: Mapping[str, Any]) -> dict[str, Any]:
    return {**part, "logprobs": list(part["logprobs"])}


def _copy_of_item(item: Item) -> Item:
    if "content" not in item:
        return dict(item)
    return {**item, "content": [_copy_of_part(part) for part in item["content"]]}
