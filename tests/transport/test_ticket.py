"""Tickets, secrets and identities: what is written, who may read it, and what is refused."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rigs import identity

from plait.errors import BadSetup
from plait.transport import Identity, SwarmSecret, Ticket, TicketPeer, verified

NOW_S = 1_800_000_000.0
SECRET = SwarmSecret(bytes(range(32)))
PEERS = (
    TicketPeer(identity(1).peer, ("tls://192.0.2.4:7000", "tls://[2001:db8::1]:7000")),
    TicketPeer(identity(2).peer, (), (identity(1).peer,)),
)
TICKET = Ticket.issue(SECRET, PEERS, expires_unix_s=NOW_S + 3600)


def test_a_ticket_comes_back_from_its_text() -> None:
    text = TICKET.text
    assert text.startswith("plait1") and len(text) < 500
    assert text.isascii() and not set(text) & set(" \n'\"$&;|<>*?\\")  # it can be pasted into any shell
    assert Ticket.parse(text, unix_now_s=NOW_S) == TICKET
    broken_by_mail = f"  {text[:40]}\n{text[40:]} \n"
    assert Ticket.parse(broken_by_mail, unix_now_s=NOW_S) == TICKET


@pytest.mark.parametrize("text", ["", "hello", "PLAIT1xyz", "https://example.org"])
def test_what_is_no_ticket_is_named_so(text: str) -> None:
    with pytest.raises(BadSetup, match="not a ticket"):
        Ticket.parse(text, unix_now_s=NOW_S)


@given(st.integers(6, len(TICKET.text) - 1), st.characters(codec="ascii", categories=["L", "N"]))
def test_a_ticket_that_was_copied_wrongly_is_refused(place: int, letter: str) -> None:
    text = TICKET.text
    changed = text[:place] + letter + text[place + 1 :]
    for wrong in (text[:place], changed):
        if wrong != text:
            with pytest.raises(BadSetup, match=r"copied whole|not a ticket"):
                Ticket.parse(wrong, unix_now_s=NOW_S)


@given(st.text(max_size=60))
def test_any_text_is_refused_kindly(text: str) -> None:
    with pytest.raises(BadSetup):
        Ticket.parse("plait1" + text, unix_now_s=NOW_S)


def test_an_expired_ticket_says_when() -> None:
    with pytest.raises(BadSetup, match=r"expired at 2027-01-15 09:00 UTC; ask a member"):
        Ticket.parse(TICKET.text, unix_now_s=NOW_S + 3600)


def test_secrets_of_different_expiry_swarm_or_use_differ() -> None:
    other = SwarmSecret(bytes(32))
    keys = {
        SECRET.key,
        SECRET.door,
        SECRET.for_ticket(1).key,
        SECRET.for_ticket(2).key,
        other.door,
        other.for_ticket(1).key,
    }
    assert len(keys) == 6
    assert SECRET.for_ticket(1).swarm == SECRET.swarm != other.swarm


def test_secrets_do_not_print() -> None:
    shown = repr(SECRET) + repr(TICKET) + repr(TICKET.secret) + repr(identity(1)) + f"{SECRET}{TICKET.secret}"
    for secret in (SECRET.key, SECRET.door, TICKET.secret.key, bytes([1]) * 32):
        assert secret.hex() not in shown and repr(secret)[2:-1] not in shown
    assert SECRET.swarm in repr(SECRET)


def test_an_identity_is_kept_in_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "identity.pem"
    first = Identity.load_or_make(file)
    assert Identity.load_or_make(file).peer == first.peer
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == ["identity.pem"]
    assert verified(first.peer, first.sign(b"data"), b"data")
    assert not verified(first.peer, first.sign(b"data"), b"date")
    assert not verified(identity(1).peer, first.sign(b"data"), b"data")
    assert not verified(first.peer, b"short", b"data")


def test_a_swarms_secret_is_kept_in_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "swarm"
    first = SwarmSecret.load_or_make(file)
    assert SwarmSecret.load_or_make(file) == first != SwarmSecret.make()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    SECRET.save(file)
    assert SwarmSecret.load_or_make(file) == SECRET
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", [Identity, SwarmSecret])
def test_a_file_that_others_may_read_or_that_holds_something_else_is_refused(
    tmp_path: Path, kind: type[Identity] | type[SwarmSecret]
) -> None:
    file = tmp_path / "secret"
    kind.load_or_make(file)
    file.chmod(0o640)
    with pytest.raises(BadSetup, match="chmod 600"):
        kind.load_or_make(file)
    file.chmod(0o600)
    file.write_bytes(b"\xff what is this")
    with pytest.raises(BadSetup, match="move it away"):
        kind.load_or_make(file)
    with pytest.raises(BadSetup, match="cannot be read or written"):
        kind.load_or_make(file / "below a file")
