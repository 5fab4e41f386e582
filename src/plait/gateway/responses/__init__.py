"""OpenAI's Responses API: `/v1/responses`.

request.py    the body, and the chat turn it asks for
document.py   the response object that echoes it
answer.py     the events of a turn, as items and events of a response
store.py      answers kept for `previous_response_id`
routes.py     the handlers
"""

from plait.gateway.responses.routes import router
from plait.gateway.responses.store import ResponseStore, StoredResponse

__all__ = ["ResponseStore", "StoredResponse", "router"]
