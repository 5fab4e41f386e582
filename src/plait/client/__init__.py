"""A small client of a server's HTTP API, for the terminal.

server_client.py   health, models, streamed chat answers; HTTP errors as the classes of `plait.errors`
"""

from plait.client.server_client import ChatChunk, Health, Message, ServerClient

__all__ = ["ChatChunk", "Health", "Message", "ServerClient"]
