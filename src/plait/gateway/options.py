"""What the gateway is told by whoever starts it, fully decided."""

from dataclasses import dataclass

from plait.gateway.tool_calls import check_tool_format


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """Limits, keys and formats of one gateway.

    `api_key_hashes` are `hash_api_key` of the keys that may enter; empty lets everyone in.
    `tool_format` names how the model writes tool calls ("auto": recognised from its chat template).

    Raises:
        BadSetup: `tool_format` is not known.
    """

    api_key_hashes: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    local_names_only: bool = False
    """Refuse requests that call this server by a name which is not of this machine: a web page elsewhere can
    point its own name here (DNS rebinding) and would then be within its origin."""
    tool_format: str = "auto"

    max_body_bytes: int = 16 * 2**20
    max_header_bytes: int = 32 * 2**10
    max_headers: int = 100
    max_json_depth: int = 64
    max_prompts: int = 256
    """Prompts in one call of /v1/completions."""
    max_open_requests: int = 1024
    """Generation requests inside the gateway, waiting for the model to load included; more are refused."""

    ping_s: float = 10.0
    """A stream that has been silent for this long gets a comment, so that proxies keep it open."""
    load_wait_s: float = 60.0
    """How long a request waits for a model that is still loading before it is refused."""
    unread_s: float = 60.0
    """A stream whose client has read nothing for this long is cut off."""
    body_s: float = 60.0
    """A request whose body has not arrived after this long is refused."""

    def __post_init__(self) -> None:
        check_tool_format(self.tool_format)
