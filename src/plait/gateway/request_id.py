"""The id of the request that a task is answering, for those who only have an error in their hands."""

from contextvars import ContextVar

current_request_id: ContextVar[str] = ContextVar("current_request_id", default="")
