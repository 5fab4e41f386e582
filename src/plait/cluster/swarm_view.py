"""The swarm as one member sees it at one moment: what decisions are made from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from plait.cluster.peer_record import PeerRecord
from plait.errors import BadRequest
from plait.ids import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmView:
    """A snapshot. Equal `version`s of one viewer mean equal snapshots, so what was computed from one can be kept.

    `records`: by peer, ordered by peer. `rtts_s`: smoothed round trips from the viewer; absent where unknown, infinite
    where the last ping failed. `banned`: peers to avoid.
    """

    model_blocks: int
    records: Mapping[PeerId, PeerRecord]
    rtts_s: Mapping[PeerId, float] = field(default_factory=dict[PeerId, float])
    banned: frozenset[PeerId] = frozenset()
    version: int = 0

    @staticmethod
    def of(
        records: Iterable[PeerRecord],
        *,
        model: str,
        model_blocks: int,
        unix_now_s: float,
        rtts_s: Mapping[PeerId, float] | None = None,
        banned: frozenset[PeerId] = frozenset(),
        version: int = 0,
    ) -> "SwarmView":
        """Make a snapshot of the records that hold now.

        Left out: expired records, those of another model, spans that the model does not have; of two records of a
        peer, the one with the lower sequence.
        """
        newest: dict[PeerId, PeerRecord] = {}
        for record in records:
            usable = (
                record.model == model
                and record.end_block <= model_blocks
                and unix_now_s < record.expires_unix_s
            )
            known = newest.get(record.peer)
            if usable and (known is None or known.sequence < record.sequence):
                newest[record.peer] = record
        return SwarmView(
            model_blocks=model_blocks,
            records=MappingProxyType({peer: newest[peer] for peer in sorted(newest)}),
            rtts_s=MappingProxyType(dict(rtts_s or {})),
            banned=banned,
            version=version,
        )

    def holders(self, block: int) -> tuple[PeerRecord, ...]:
        """Peers that are online and serve a block, ordered by peer.

        Banned ones are left out, unless that leaves nobody: PETALS ignores a ban that would make a block unreachable.
        """
        online = tuple(
            record
            for record in self.records.values()
            if record.state == "online" and record.first_block <= block < record.end_block
        )
        return tuple(record for record in online if record.peer not in self.banned) or online

    def find(self, text: str) -> PeerId:
        """The peer with this id, this name, or an id that begins so (four digits at least).

        Raises:
            BadRequest: none or several are meant.
        """
        if text in self.records:
            return PeerId(text)
        found = [peer for peer, record in self.records.items() if record.name == text] or [
            peer for peer in self.records if len(text) >= 4 and peer.startswith(text)
        ]
        if len(found) != 1:
            raise BadRequest(
                f"{text!r} names {len(found) or 'no'} peer{'s' if found else ''} of the {len(self.records)} known; "
                "give an id, a name, or the beginning of an id",
                param="route",
            )
        return found[0]

    def missing_blocks(self, blocks: range) -> tuple[int, ...]:
        """Those of `blocks` that no online peer serves, in order."""
        covered = bytearray(self.model_blocks)
        for record in self.records.values():
            if record.state == "online":
                covered[record.first_block : record.end_block] = b"\1" * len(record.span)
        return tuple(block for block in blocks if block >= self.model_blocks or not covered[block])


def format_blocks(blocks: Iterable[int]) -> str:
    """Print blocks as half-open spans: 3, 4, 5 and 9 are "3:6, 9:10"."""
    spans: list[list[int]] = []
    for block in blocks:
        if spans and spans[-1][1] == block:
            spans[-1][1] = block + 1
        else:
            spans.append([block, block + 1])
    return ", ".join(f"{first}:{end}" for first, end in spans)
