"""Work for a client that may go away: when it does, the work is cancelled at once."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` for a request whose body has been read; cancel it when the client goes away.

    Raises:
        ClientDisconnect: the client went away; what `work` held is released.
    """
    work_task = asyncio.ensure_future(work)
    gone_task = asyncio.ensure_future(_wait_gone(request))
    try:
        await asyncio.wait((work_task, gone_task), return_when=asyncio.FIRST_COMPLETED)
        if work_task.done():
            return work_task.result()
        raise ClientDisconnect
    finally:
        for task in (work_task, gone_task):
            task.cancel()
        await asyncio.gather(work_task, gone_task, return_exceptions=True)


async def _wait_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
