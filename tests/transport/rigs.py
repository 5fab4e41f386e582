"""Two machines and a way between them, for each kind of carrier."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from plait.transport import (
    Carrier,
    Identity,
    Link,
    MemoryNet,
    SwarmSecret,
    TcpCarrier,
    TlsCarrier,
    UnixCarrier,
)
from plait.wire import FrameLimits

KINDS = ("memory", "unix", "tcp", "tls")
LIMITS = FrameLimits(max_header_bytes=1 << 16, max_buffers=8, max_bytes=16 << 20)
SECRET = SwarmSecret(bytes(range(32)))


def identity(number: int) -> Identity:
    return Identity.from_seed(bytes([number]) * 32)


class Rig:
    """`near` dials `far`; each has an identity, and a carrier for the address at which `far` listens."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.near, self.far = identity(1), identity(2)
        self.net = MemoryNet()
        match kind:
            case "memory":
                self.address = "mem://far"
            case "unix":
                self.address = f"unix://{folder}/far"
            case _:
                self.address = f"{kind}://127.0.0.1:0"

    def carrier(self, owner: Identity) -> Carrier:
        match self.kind:
            case "memory":
                return self.net.carrier("near" if owner is self.near else "far")
            case "unix":
                return UnixCarrier()
            case "tcp":
                return TcpCarrier()
            case _:
                return TlsCarrier(owner, SECRET)

    @asynccontextmanager
    async def links(self, *, limits: FrameLimits = LIMITS) -> AsyncIterator[tuple[Link, Link]]:
        """An open link: the end that dialled, the end that accepted."""
        accepted: asyncio.Queue[Link] = asyncio.Queue()
        listener = await self.carrier(self.far).listen(self.address, accepted.put_nowait)
        try:
            dialled = await self.carrier(self.near).dial(listener.address, peer=self.far.peer, timeout_s=10)
            taken = await accepted.get()
            await taken.opened()
            dialled.limits = taken.limits = limits
            yield dialled, taken
            await dialled.close()
            await taken.close()
        finally:
            await listener.close()
