"""What a peer says of itself: the record that spreads through a swarm."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from plait.ids import PeerId

PeerState = Literal["joining", "online", "draining", "offline"]
"""`joining`: has claimed its span and loads it. `online`: serves. `draining`: serves what it has, takes nothing new.
`offline`: has left."""

MAX_BLOCKS = 4096
MAX_ADDRESSES = 16
MAX_RTTS = 2048
MAX_TEXT = 256


def check_peer_id(peer: str) -> None:
    """Raise ValueError unless this is an ed25519 public key in lower-case hex."""
    if len(peer) != 64 or not set(peer) <= set("0123456789abcdef"):
        raise ValueError(f"{peer[:80]!r} is no peer: an ed25519 public key in 64 lower-case hex digits")


def _check_amounts(owner: object, *names: str) -> None:
    for name in names:
        amount = getattr(owner, name)
        if not 0 <= amount < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, not {amount}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRates:
    """How fast a peer is, measured on one block; 0 is unknown.

    `decode_tokens_per_s`: steps of one token, batch 1, KV cache in use (PETALS: inference_rps).
    `saturated_decode_tokens_per_s`: one token for each of many sequences, all sequences together.
    `prefill_tokens_per_s`: long prompts (PETALS: forward_rps).
    `network_tokens_per_s`: hidden states through its slower direction (PETALS: network_rps).
    """

    decode_tokens_per_s: float = 0.0
    saturated_decode_tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    network_tokens_per_s: float = 0.0

    def __post_init__(self) -> None:
        _check_amounts(self, *self.__slots__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLoad:
    """What a peer is doing.

    `sessions`: those that cross it. `queued_tokens`: tokens that have arrived and did not run yet. `step_s`: smoothed
    duration of its forward passes; 0 is unknown. `kv_free_tokens` of `kv_total_tokens`: context that fits in its cache,
    through all the blocks it serves (a KV block holds every block of the span, whoever crosses only some of them
    included); a total of 0 is unknown. `sent_bytes`, `received_bytes`: over all its links since it started.
    """

    sessions: int = 0
    queued_tokens: int = 0
    step_s: float = 0.0
    kv_free_tokens: int = 0
    kv_total_tokens: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0

    def __post_init__(self) -> None:
        _check_amounts(self, *self.__slots__)
        if self.kv_free_tokens > self.kv_total_tokens:
            raise ValueError(
                f"kv_free_tokens is {self.kv_free_tokens}, above the total of {self.kv_total_tokens}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerProgress:
    """How far a peer is that joins: what it does, bytes done, and bytes in all; a total of 0 is unknown."""

    stage: str = ""
    done_bytes: int = 0
    total_bytes: int = 0

    def __post_init__(self) -> None:
        _check_amounts(self, "done_bytes", "total_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerTerms:
    """What it costs to use a peer and how long it tends to stay; 0 is unknown.

    `price_per_hour`: of the whole machine, in the swarm's currency. `busy_watts`: power drawn while it computes.
    `mean_lifetime_s`: mean time until it fails or leaves.
    """

    price_per_hour: float = 0.0
    busy_watts: float = 0.0
    mean_lifetime_s: float = 0.0

    def __post_init__(self) -> None:
        _check_amounts(self, *self.__slots__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLending:
    """KV memory that a peer lends and borrows; totals are since it started.

    `layout`: what its KV blocks are like; those of one model, span and layout lend to each other. Empty: it does not
    lend. `manages`: it keeps the ledger for them now. `empty_blocks` of those borrowed hold nothing yet. `query_bytes`
    went to creditors, `part_bytes` came back; `moved_bytes` are KV content that it sent.
    """

    layout: str = ""
    policy: str = ""
    manages: bool = False
    kv_blocks: int = 0
    lent_blocks: int = 0
    borrowed_blocks: int = 0
    empty_blocks: int = 0
    moved_out_total: int = 0
    moved_home_total: int = 0
    recalled_total: int = 0
    lost_total: int = 0
    granted_total: int = 0
    refused_total: int = 0
    query_bytes_total: int = 0
    part_bytes_total: int = 0
    moved_bytes_total: int = 0

    def __post_init__(self) -> None:
        if len(self.layout) > MAX_TEXT or len(self.policy) > MAX_TEXT:
            raise ValueError(f"a text of more than {MAX_TEXT} characters")
        _check_amounts(self, *(name for name in self.__slots__ if name not in ("layout", "policy")))


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRecord:
    """One peer's announcement: the one with the higher `sequence` replaces the other; none outlives `expires_unix_s`.

    `model`: fingerprint of the model it serves. `first_block`, `end_block`: its span, half open; both 0 is none.
    `addresses`: where it can be dialled ("tls://192.0.2.4:7000"). `through`: peers that splice to it when it cannot.
    `rtts_s`: smoothed round trips from it to others; infinite where the last one failed. `progress`: of its loading,
    while it is joining.

    Raises:
        ValueError: the record cannot be true, or is larger than any real one. (msgspec turns this into its own
            ValidationError when it decodes one.)
    """

    peer: PeerId
    name: str
    model: str
    first_block: int = 0
    end_block: int = 0
    state: PeerState = "online"
    addresses: tuple[str, ...] = ()
    through: tuple[PeerId, ...] = ()
    rates: PeerRates = PeerRates()
    load: PeerLoad = PeerLoad()
    progress: PeerProgress = PeerProgress()
    terms: PeerTerms = PeerTerms()
    lending: PeerLending = PeerLending()
    rtts_s: dict[PeerId, float] = field(default_factory=dict[PeerId, float])
    weight_format: str = ""
    kv_format: str = ""
    memory_bytes: int = 0
    version: str = ""
    sequence: int = 0
    issued_unix_s: float = 0.0
    expires_unix_s: float = 0.0

    def __post_init__(self) -> None:
        check_peer_id(self.peer)
        if not 0 <= self.first_block <= self.end_block <= MAX_BLOCKS:
            raise ValueError(
                f"blocks {self.first_block}:{self.end_block} are no span of at most {MAX_BLOCKS}"
            )
        if self.state not in get_args(PeerState):
            raise ValueError(f"state {self.state!r} is none of {', '.join(get_args(PeerState))}")
        if len(self.addresses) > MAX_ADDRESSES or len(self.through) > MAX_ADDRESSES:
            raise ValueError(f"more than {MAX_ADDRESSES} addresses")
        texts = (self.name, self.model, self.weight_format, self.kv_format, self.version, self.progress.stage)
        if any(len(text) > MAX_TEXT for text in (*texts, *self.addresses)):
            raise ValueError(f"a text of more than {MAX_TEXT} characters")
        for peer in self.through:
            check_peer_id(peer)
        if len(self.rtts_s) > MAX_RTTS:
            raise ValueError(f"more than {MAX_RTTS} round trips")
        for peer, rtt_s in self.rtts_s.items():
            check_peer_id(peer)
            if not rtt_s >= 0:  # also refuses NaN; infinite is a ping that failed
                raise ValueError(f"a round trip of {rtt_s} s to {peer}")
        _check_amounts(self, "memory_bytes", "sequence")
        if math.isnan(self.issued_unix_s) or math.isnan(self.expires_unix_s):
            raise ValueError("issued or expires at no time")

    @property
    def span(self) -> range:
        """The blocks it serves; empty if none."""
        return range(self.first_block, self.end_block)

    @property
    def is_listening(self) -> bool:
        """Others can dial it as it is; at an address of iroh's, somebody may have to introduce them first."""
        return any(not address.startswith("iroh://") for address in self.addresses)

    @property
    def relayed(self) -> bool:
        """Others reach it only through another peer, at a fraction of its network rate."""
        return bool(self.through)
