"""The HTTP front door: API dialects in, one engine behind.

app.py                  every route, behind one entrance
entrance.py, auth.py    limits, API keys, request ids, access log
options.py              what the gateway is told
front_door.py           what handlers share: engine, options, metrics
json_body.py            strict reading of request bodies
errors.py               errors as HTTP, in each dialect's envelope
sse.py, disconnect.py   streams, and clients that are slow, silent or gone
turn.py, tool_calls/    one chat turn apart from any dialect; calls of tools in its text
prompt.py               texts to tokens, and the room for an answer
chat.py, completions.py, responses/, anthropic/         the dialects, each with its request
content_type.py, request_id.py                          what several dialects ask of a message, and of a request
models.py, tokenize.py, health.py                       the small endpoints
swarm.py, swarm_desk.py the machines behind the gateway of a swarm
page_files.py, page/    the web page
http_protocol.py        uvicorn's protocol, bounded
"""

from plait.gateway.app import create_app
from plait.gateway.auth import hash_api_key, new_api_key
from plait.gateway.http_protocol import HttpProtocol
from plait.gateway.options import GatewayOptions
from plait.gateway.swarm_desk import SwarmDesk

__all__ = ["GatewayOptions", "HttpProtocol", "SwarmDesk", "create_app", "hash_api_key", "new_api_key"]
