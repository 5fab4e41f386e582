"""Every error that plait raises on purpose.

ServingError
├── BadRequest      the caller must change the request          HTTP 400
│   ├── Unauthorized     no valid API key                       HTTP 401
│   ├── ContextLengthExceeded   prompt and answer are too long  HTTP 400
│   └── NotFound         no such model or resource              HTTP 404
├── NoCapacity      nothing is wrong, nothing is free           HTTP 429 or 503, Retry-After
│   ├── KvCacheFull      no KV block is free
│   ├── NotReady         loading or draining                    HTTP 503
│   └── NoRoute          no peer serves some blocks             HTTP 503
├── EngineFailure   the engine broke while serving a request    HTTP 500
│   ├── EngineLost       a part of it is gone: it stops         HTTP 500, exit code 1
│   ├── PeerLost         another machine is gone or silent; the session goes on without it
│   │   └── BlocksLost   KV blocks that it had lent are gone with it; they are computed again
│   └── BadFrame         bytes that the swarm's protocol does not allow
└── BadSetup        settings, weights or hardware do not fit    exit code 2
    ├── MissingCost      nothing says what this would cost
    └── OutsideDomain    it is larger than everything that was measured

A message says what, where, and what to do. The class says whose fault it is, hence who retries.
"""


class ServingError(Exception):
    """Root of the tree; `message` is one or two sentences for a person."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class BadRequest(ServingError):
    """The request cannot be served as it is; `param` names the field at fault, if there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Unauthorized(BadRequest):
    """No API key, or one that this server does not know."""


class NotFound(BadRequest):
    """A model or resource that this server does not have."""


class ContextLengthExceeded(BadRequest):
    """The prompt and the room asked for its answer do not fit the model's context."""


class NoCapacity(ServingError):
    """Nothing is wrong with the request, but there is no room for it now; retry after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class KvCacheFull(NoCapacity):
    """No KV block is free."""


class NotReady(NoCapacity):
    """The server is loading its model or draining."""


class NoRoute(NoCapacity):
    """No chain of peers covers the model now; `missing_blocks` have no holder."""

    def __init__(self, message: str, *, missing_blocks: tuple[int, ...] = ()) -> None:
        super().__init__(message, retry_after_s=5.0)
        self.missing_blocks = missing_blocks


class EngineFailure(ServingError):
    """The engine broke while it served this request; the request may be retried."""


class EngineLost(EngineFailure):
    """A process that the engine cannot do without is gone or does not answer: the engine stops."""


class PeerLost(EngineFailure):
    """Another machine of the swarm is gone, does not answer, or broke the protocol."""


class BlocksLost(PeerLost):
    """Borrowed KV blocks are gone; `kv_blocks` are the numbers that stood for them, where the debtor knows."""

    def __init__(self, message: str, *, kv_blocks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.kv_blocks = kv_blocks


class BadFrame(EngineFailure):
    """Bytes that are not what the swarm's protocol allows; whoever sent them is cut off."""


class BadSetup(ServingError):
    """Settings, weights or hardware do not fit together; nothing was started."""


class MissingCost(BadSetup):
    """No figure or measurement says what a part of the work would cost; the message names the part."""


class OutsideDomain(BadSetup):
    """Work beyond what was measured, where nobody allowed extrapolation; the message says in which quantity."""
