"""Anthropic's Messages API: `/v1/messages` and `/v1/messages/count_tokens`.

request.py     the bodies, and the chat turn they ask for
answer.py      the events of a turn, as blocks and events of a message
errors.py      the error envelope, for every path under /v1/messages
documents.py   what the OpenAPI document says about answers
routes.py      the handlers
"""

from plait.gateway.anthropic.errors import ANTHROPIC_ERRORS
from plait.gateway.anthropic.routes import router

__all__ = ["ANTHROPIC_ERRORS", "router"]
