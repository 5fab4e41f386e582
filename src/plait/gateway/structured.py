"""Demands on the form of an answer: `response_format` and vLLM's structured outputs, as one constraint."""

import json
from typing import Any, Literal

from pydantic import Field

from plait.errors import BadRequest
from plait.gateway.wire import WireModel
from plait.session import Constraint

MAX_CHOICES = 1024


class JsonSchemaFormat(WireModel):
    """A named JSON schema, as OpenAI writes it."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(WireModel):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(WireModel):
    """vLLM's `structured_outputs`; at most one of them."""

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


def constraint_of(response_format: ResponseFormat | None, structured: StructuredOutputs) -> Constraint | None:
    """The one constraint that was asked for, if any.

    Raises:
        BadRequest: several were asked for, or one is incomplete.
    """
    constraints = [
        constraint
        for constraint in (_of_response_format(response_format), *_of_structured(structured))
        if constraint is not None
    ]
    if len(constraints) > 1:
        raise BadRequest(
            "the answer can be held to one form only: give one of response_format and structured_outputs",
            param="structured_outputs",
        )
    return constraints[0] if constraints else None


def _of_response_format(response_format: ResponseFormat | None) -> Constraint | None:
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return Constraint(kind="json_object")
    if response_format.json_schema is None:
        raise BadRequest(
            "response_format of type json_schema needs a field json_schema",
            param="response_format.json_schema",
        )
    schema = response_format.json_schema.schema_
    if schema is None:
        return Constraint(kind="json_object")
    return Constraint(kind="json_schema", text=json.dumps(schema))


def _of_structured(structured: StructuredOutputs) -> list[Constraint | None]:
    return [
        _of_json(structured.json_),
        None if structured.regex is None else Constraint(kind="regex", text=structured.regex),
        None if structured.grammar is None else Constraint(kind="grammar", text=structured.grammar),
        None if structured.choice is None else _of_choice(structured.choice),
        Constraint(kind="json_object") if structured.json_object else None,
    ]


def _of_json(schema: str | dict[str, Any] | None) -> Constraint | None:
    if schema is None:
        return None
    return Constraint(kind="json_schema", text=schema if isinstance(schema, str) else json.dumps(schema))


def _of_choice(choice: list[str]) -> Constraint:
    if not choice or not all(choice) or len(choice) > MAX_CHOICES:
        raise BadRequest(
            f"choice takes 1 to {MAX_CHOICES} strings, none of them empty", param="structured_outputs.choice"
        )
    # Strings of Lark grammars escape as JSON's do.
    return Constraint(kind="grammar", text="start: " + " | ".join(json.dumps(text) for text in choice))
