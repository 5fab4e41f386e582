"""What every handler of the gateway shares: the engine, the options and the metrics of one app."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from plait.errors import BadRequest, NotFound, NotReady, ServingError
from plait.gateway.options import GatewayOptions
from plait.gateway.swarm_desk import SwarmDesk
from plait.metrics import ServingMetrics
from plait.session import GenerationRequest, RequestDelta, RouteAsk
from plait.worker import AsyncEngine, ServedModel, SwarmEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontDoor:
    """The way from a handler to the engine."""

    engine: AsyncEngine | SwarmEngine
    options: GatewayOptions
    metrics: ServingMetrics
    started_unix_s: int
    swarm: SwarmDesk | None = None
    """What is known and can be asked of the swarm that this server is the gateway of, if it is."""

    def accepted_route(self, ask: RouteAsk | None) -> RouteAsk | None:
        """A request's wish about its route, which only a swarm can follow.

        Raises:
            BadRequest: there is a wish and no swarm.
        """
        if ask is not None and self.swarm is None:
            raise BadRequest(
                "this server is one machine, so there is no route to choose; leave out 'route', or start the server "
                "with --swarm",
                param="route",
            )
        return ask

    async def ready_model(self, name: str | None) -> ServedModel:
        """The served model, after a bounded wait for it to load; `name` None means whichever it is.

        Raises:
            NotFound: the model asked for is another one (known even while loading).
            NotReady: loading takes longer than a request may wait, or it failed, or the server is draining.
        """
        if name and name not in self.engine.names:
            known = ", ".join(repr(served) for served in self.engine.names)
            raise NotFound(f"the model {name!r} does not exist here; this server has {known}", param="model")
        if self.engine.state == "loading":
            try:
                async with asyncio.timeout(self.options.load_wait_s):
                    await self.engine.wait_settled()
            except TimeoutError:
                progress = self.engine.load_progress
                raise NotReady(
                    f"the model is still loading ({progress.stage}); see /health for how far it is",
                    retry_after_s=RETRY_LOADING_S,
                ) from None
        return self.engine.model

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestDelta, None]:
        """`AsyncEngine.generate`, measured."""
        observed = self.metrics.observe(request, now_s=time.monotonic())
        try:
            async with aclosing(self.engine.generate(request)) as deltas:
                async for delta in deltas:
                    observed.delta(delta, now_s=time.monotonic())
                    yield delta
        except ServingError:
            observed.failed()
            raise
        finally:
            observed.close()


# A model that was not ready within the wait is probably being downloaded.
RETRY_LOADING_S = 5.0


def front_door_of(request: Request) -> FrontDoor:
    """The app's front door, for handlers (`door: Door`)."""
    door = request.app.state.front_door
    assert isinstance(door, FrontDoor)
    return door


Door = Annotated[FrontDoor, Depends(front_door_of)]
