"""Clients that ask a swarm's gateways, one answer after the other, and note when each token came."""

import asyncio
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from swarm.unequal import UnequalSwarm

PROMPT_TOKENS = 8
ANSWER_TOKENS = (16, 48)


@dataclass(slots=True)
class Asked:
    """One answer: when it was asked for, when its tokens came (seconds of the running loop), and its request's id."""

    client: int
    gateway: str
    request: str
    asked_s: float
    token_s: list[float] = field(default_factory=list)
    error: str = ""
    complete: bool = False


class Crowd:
    """Clients that ask one answer after the other, each at its gateway; a lone one goes round the gateways."""

    def __init__(self, swarm: UnequalSwarm, route: Mapping[str, Any], clients: int, seed: int) -> None:
        self._swarm = swarm
        self._route = dict(route)
        self._clients = clients
        self._rng = np.random.default_rng(seed)
        self.answers: list[Asked] = []

    async def ask_for_s(self, seconds: float) -> float:
        """Ask until time is up, then hang up; returns when it was, on the loop's clock."""
        loop = asyncio.get_running_loop()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits) as http:
            asking = [asyncio.create_task(self._ask_often(http, client)) for client in range(self._clients)]
            await asyncio.sleep(seconds)
            until_s = loop.time()
            for task in asking:
                task.cancel()
            for outcome in await asyncio.gather(*asking, return_exceptions=True):
                if isinstance(outcome, Exception):
                    raise outcome
        return until_s

    async def _ask_often(self, http: httpx.AsyncClient, client: int) -> None:
        # They do not come all in the same moment.
        await asyncio.sleep(float(self._rng.uniform(0, 1)))
        gateways = list(self._swarm.origins)
        for turn in itertools.count():
            gateway = gateways[(client + (turn if self._clients == 1 else 0)) % len(gateways)]
            await self._ask(http, client, gateway)

    async def _ask(self, http: httpx.AsyncClient, client: int, gateway: str) -> None:
        loop = asyncio.get_running_loop()
        body = {
            "prompt": [int(token) for token in self._rng.integers(300, 2000, PROMPT_TOKENS)],
            "max_tokens": int(self._rng.integers(*ANSWER_TOKENS)),
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
            "route": self._route,
        }
        answer = Asked(client=client, gateway=gateway, request="", asked_s=loop.time())
        self.answers.append(answer)
        async with http.stream(
            "POST", self._swarm.origins[gateway] + "/v1/completions", json=body
        ) as response:
            if response.status_code != 200:
                answer.error = (await response.aread()).decode()
                await asyncio.sleep(1.0)
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    answer.error = event["error"]["message"]
                    continue
                answer.request = event["id"] + "-0"  # the first prompt of the body
                count = sum(len(choice.get("token_ids") or []) for choice in event["choices"])
                answer.token_s += [loop.time()] * count
        answer.complete = not answer.error
