"""The HTTP app: every route of every dialect, behind one entrance."""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from plait import __version__
from plait.errors import ServingError
from plait.gateway import anthropic, chat, completions, health, models, responses, swarm, tokenize
from plait.gateway.entrance import Entrance
from plait.gateway.errors import OPENAI_ERRORS, ErrorDialect, error_response, http_reply, reply_of
from plait.gateway.front_door import FrontDoor
from plait.gateway.options import GatewayOptions
from plait.gateway.page_files import PAGE_FOLDER, page_paths, page_router
from plait.gateway.swarm_desk import SwarmDesk
from plait.metrics import ServingMetrics, SwarmMetrics
from plait.worker import AsyncEngine, SwarmEngine

_OPEN_PATHS = frozenset({"/health", "/healthz", "/readyz", "/favicon.ico"})

# Paths whose clients expect another envelope than OpenAI's, by prefix.
_ERROR_DIALECTS: tuple[tuple[str, ErrorDialect], ...] = (("/v1/messages", anthropic.ANTHROPIC_ERRORS),)


def create_app(
    engine: AsyncEngine | SwarmEngine, options: GatewayOptions | None = None, *, desk: SwarmDesk | None = None
) -> FastAPI:
    """The app that serves an engine, which someone else starts and stops; `desk` is for the gateway of a swarm."""
    options = options or GatewayOptions()
    metrics = ServingMetrics(engine.status, model_name=engine.names[0])
    if desk is not None:
        metrics.registry.register(SwarmMetrics(desk.facts))
    app = FastAPI(title="plait", version=__version__, redoc_url=None, lifespan=_nothing_of_its_own)
    app.state.front_door = FrontDoor(
        engine=engine, options=options, metrics=metrics, started_unix_s=int(time.time()), swarm=desk
    )
    for module in (chat, completions, responses, anthropic, models, tokenize, health, swarm):
        app.include_router(module.router)
    app.include_router(page_router(PAGE_FOLDER))
    for kind in (ServingError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    open_paths = _OPEN_PATHS | page_paths(PAGE_FOLDER).keys()
    app.add_middleware(
        CORSMiddleware,
        allow_origins=options.cors_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
    )
    app.add_middleware(
        Entrance,
        options=options,
        metrics=metrics,
        is_open=open_paths.__contains__,
        dialect_of=error_dialect_of,
    )
    return app


def error_dialect_of(path: str) -> ErrorDialect:
    """The envelope in which errors on a path are written."""
    for prefix, dialect in _ERROR_DIALECTS:
        if path == prefix or path.startswith(prefix + "/"):
            return dialect
    return OPENAI_ERRORS


async def _answer_error(request: Request, error: Exception) -> Response:
    path = request.scope["path"]
    if (
        isinstance(error, HTTPException)
        and error.status_code in (404, 405)
        and error.detail in _STOCK_DETAILS
    ):
        reply = http_reply(error.status_code, f"{error.detail}: {request.method} {path}; see /openapi.json")
    else:
        reply = reply_of(error)
    response = error_response(reply, error_dialect_of(path))
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
    return response


_STOCK_DETAILS = frozenset({"Not Found", "Method Not Allowed"})


async def _answer_nobody(request: Request, error: Exception) -> Response:
    request.scope["plait.outcome"] = "disconnected"
    return Response(status_code=499)


@asynccontextmanager
async def _nothing_of_its_own(app: FastAPI) -> AsyncGenerator[None, None]:
    yield
