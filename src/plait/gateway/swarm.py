"""`/swarm/...`: the machines behind a gateway, how a request would be routed, who joins and who is to leave."""

import time
from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import Field

from plait.errors import NotFound, Unauthorized
from plait.gateway.front_door import Door, FrontDoor
from plait.gateway.json_body import JsonRoute
from plait.gateway.openai_documents import json_responses
from plait.gateway.openai_json import json_response
from plait.gateway.sampling_fields import RouteFields, Word
from plait.gateway.swarm_desk import SwarmDesk
from plait.gateway.wire import WireModel

router = APIRouter(route_class=JsonRoute, tags=["swarm"])


class RouteQuestion(WireModel):
    """A request, as far as its route is concerned; `need_tokens` is its prompt and answer together.

    With `beside_front` the answer has the front also where the mode does not choose from one, and the chain's values.
    """

    route: RouteFields | None = None
    beside_front: bool = False
    need_tokens: Annotated[int, Field(ge=0, le=2**24)] | None = None


class LeaveOrder(WireModel):
    """Which machine is to leave: its name, its id, or the beginning of its id."""

    peer: Word


@router.get("/swarm/status", responses=json_responses("Machines, spans, links, sessions."))
async def status(door: Door, max_links: Annotated[int | None, Query(ge=0, le=4096)] = None) -> Response:
    """The swarm as this gateway sees it; of each machine at most `max_links` links, the shortest."""
    per_s = round(door.metrics.token_rate.per_s(time.monotonic()), 2)
    return json_response({**_desk(door).status(max_links=max_links), "tokens_per_s": per_s})


@router.get("/swarm/advice", responses=json_responses("Sentences, and what each set of machines would do."))
async def advice(door: Door) -> Response:
    """Which machines to use, when fewer are faster, and why each serves what it serves."""
    return json_response(await _desk(door).advice())


@router.get("/swarm/ticket", responses=json_responses("A ticket, to be passed on like a password."))
async def ticket(door: Door) -> Response:
    """A ticket that lets other machines join."""
    return json_response({"ticket": _owners_desk(door).ticket()})


@router.post("/swarm/route", responses=json_responses("The chain chosen, and the front."))
async def route(question: RouteQuestion, door: Door) -> Response:
    """How a request would be routed now; nothing runs."""
    desk = _desk(door)
    ask = (question.route or RouteFields()).ask()
    return json_response(await desk.route(ask, question.need_tokens or 0, beside_front=question.beside_front))


@router.post("/swarm/leave", responses=json_responses("The id of the machine that was told."))
async def leave(order: LeaveOrder, door: Door) -> Response:
    """Tell a machine to hand over its sessions and leave."""
    return json_response({"peer": await _owners_desk(door).ask_to_leave(order.peer)})


def _owners_desk(door: FrontDoor) -> SwarmDesk:
    """The desk, for what lets machines in or out: not for everybody who may ask a server without keys something."""
    desk = _desk(door)
    if not (door.options.api_key_hashes or door.options.local_names_only):
        raise Unauthorized(
            "this server answers anyone who reaches it (--insecure-no-auth), so nobody changes its swarm through it; "
            "start it with --api-key, or without --insecure-no-auth on a loopback address"
        )
    return desk


def _desk(door: FrontDoor) -> SwarmDesk:
    if door.swarm is None:
        raise NotFound("this server is not part of a swarm; start one with: plait serve MODEL --swarm")
    return door.swarm
