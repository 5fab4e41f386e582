"""Every message survives the codec; nothing else does."""

from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadFrame
from plait.ids import PeerId
from plait.wire import (
    MAX_LOAN_BLOCKS,
    MAX_RECORDS,
    AttendRefused,
    BlockContent,
    Bounded,
    Credit,
    Goodbye,
    Gossip,
    Hello,
    LinkMessage,
    LoanGrant,
    LoanMessage,
    LoanRenew,
    LoanReserve,
    MembershipMessage,
    Message,
    Ping,
    SignedRecord,
    SpliceOpen,
    WireBlocks,
    decode_message,
    encode_message,
)

PEER = PeerId("0123456789abcdef" * 4)
KINDS: tuple[type[Bounded], ...] = get_args(Message)


def test_every_message_is_frozen_tagged_and_closed() -> None:
    assert set(get_args(LinkMessage)) | set(get_args(MembershipMessage)) <= set(KINDS)
    for kind in KINDS:
        config = kind.__struct_config__
        assert config.frozen and config.forbid_unknown_fields and config.array_like, kind
        assert isinstance(config.tag, str), kind
    assert len({kind.__struct_config__.tag for kind in KINDS}) == len(KINDS)


def test_every_field_that_can_grow_has_a_bound() -> None:
    def unbounded(schema: object, path: str) -> list[str]:
        found: list[str] = []
        if isinstance(schema, dict):
            kind = schema.get("type")
            if kind == "string" and not {"maxLength", "pattern", "enum", "const"} & set(schema):
                found.append(path)
            if kind == "array" and "maxItems" not in schema and "prefixItems" not in schema:
                found.append(path)
            if kind == "object" and "maxProperties" not in schema:
                found.append(path)
            for key, value in schema.items():
                found += unbounded(value, f"{path}.{key}")
        elif isinstance(schema, list):
            for number, value in enumerate(schema):
                found += unbounded(value, f"{path}[{number}]")
        return found

    _, components = msgspec.json.schema_components(
        list(get_args(LinkMessage | MembershipMessage | LoanMessage))
    )
    assert unbounded(components, "") == []


@pytest.mark.parametrize(
    "message",
    [
        Ping(2**53),
        Goodbye("it is stopping; good luck"),
        SpliceOpen(7, PEER),
        LoanGrant(3, WireBlocks((0, 2**31 - 1), (1, 2**62 - 1))),
        LoanRenew(WireBlocks((), ()), -1),
        AttendRefused(9, "busy"),
        Gossip((SignedRecord(b"body", bytes(64)), SignedRecord(b"", bytes(64)))),
        Hello(
            first_version=1,
            last_version=2,
            peer=PEER,
            nonce=bytes(32),
            incarnation=bytes(32),
            last_link=bytes(32),
            ticket_expires_unix_s=0,
        ),
    ],
)
def test_messages_come_back(message: Message) -> None:
    assert decode_message(encode_message(message)) == message


@pytest.mark.parametrize(
    "wrong",
    [
        Ping(-1),
        Credit(2**60),
        Goodbye("x" * 401),
        SpliceOpen(2**32, PEER),
        LoanReserve(1, 0),
        LoanReserve(1, MAX_LOAN_BLOCKS + 1),
        BlockContent(-1, 1),
        LoanRenew(WireBlocks((0,) * (MAX_LOAN_BLOCKS + 1), ()), 0),
        AttendRefused(1, "tired"),  # pyright: ignore[reportArgumentType]  what a stranger may send
        SpliceOpen(1, PeerId("../../etc/passwd")),
        SpliceOpen(1, PeerId(PEER.upper())),
        SpliceOpen(1, PeerId(PEER + "\n")),
        Gossip((SignedRecord(b"", bytes(64)),) * (MAX_RECORDS + 1)),
        Gossip((SignedRecord(bytes(1 << 15), bytes(64)),)),
        Gossip((SignedRecord(b"", bytes(63)),)),
    ],
)
def test_a_field_out_of_bounds_is_refused(wrong: Message) -> None:
    with pytest.raises(BadFrame, match="not a message"):
        decode_message(encode_message(wrong))


@pytest.mark.parametrize(
    "wrong",
    [
        ["ping"],
        ["ping", 1, 2],
        ["pang", 1],
        ["ping", "1"],
        ["ping", 1.5],
        ["ping", None],
        {"type": "ping", "number": 1},
        [],
        7,
        None,
    ],
)
def test_what_is_no_message_is_refused(wrong: object) -> None:
    with pytest.raises(BadFrame, match="not a message"):
        decode_message(msgspec.msgpack.encode(wrong))


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    try:
        message = decode_message(noise)
    except BadFrame:
        return
    assert isinstance(message, KINDS)


def test_a_tag_that_is_no_text_is_refused() -> None:
    with pytest.raises(BadFrame, match="not a message"):
        decode_message(b"\x91\xa1\xff")


def test_depth_is_refused() -> None:
    for opening in (b"\x91", b"\x81\x01"):
        with pytest.raises(BadFrame):
            decode_message(opening * 500_000 + b"\xc0")
