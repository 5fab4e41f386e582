"""Who turns out slower than it says is told from the innocent beside it, and gets another try in time."""

from plait.cluster import PeerRates, PeerRecord, TrackRecords
from plait.cluster.track_records import FORGET_S, MAX_FACTOR
from plait.ids import PeerId

A, B, C = (PeerId(digit * 64) for digit in "abc")


def rate(tracks: TrackRecords, peer: PeerId, now_s: float) -> float:
    """The rate that is believed of a peer which says 64."""
    record = PeerRecord(
        peer=peer,
        name="it",
        model="m",
        first_block=0,
        end_block=4,
        rates=PeerRates(decode_tokens_per_s=64.0),
        sequence=1,
        issued_unix_s=0.0,
        expires_unix_s=1e9,
    )
    return tracks.corrected(record, now_s).rates.decode_tokens_per_s


def test_what_was_expected_changes_nothing() -> None:
    tracks = TrackRecords().after_chain([A, B], 0.1, 0.29, 0.0).after_chain([A, B], 0.1, 0.02, 1.0)
    assert rate(tracks, A, 2.0) == rate(tracks, B, 2.0) == rate(tracks, C, 2.0) == 64.0


def test_who_has_kept_its_word_is_not_blamed_for_another() -> None:
    tracks = TrackRecords().after_chain([A, B], 0.1, 0.1, 0.0).after_chain([A, C], 0.1, 0.8, 1.0)
    assert rate(tracks, A, 1.0) == 64.0
    assert rate(tracks, C, 1.0) == 8.0


def test_all_are_blamed_where_nothing_is_known_until_they_prove_themselves() -> None:
    tracks = TrackRecords().after_chain([A, B], 0.1, 0.8, 0.0)
    assert rate(tracks, A, 0.0) == rate(tracks, B, 0.0) == 8.0
    # A beside somebody else is expected to take eight times as long, and does not.
    tracks = tracks.after_chain([A, C], 0.8, 0.1, 1.0)
    assert rate(tracks, A, 1.0) == 64.0
    assert rate(tracks, B, 1.0) == 8.0


def test_one_that_lies_in_spite_of_its_past_is_found() -> None:
    tracks = TrackRecords().after_chain([A, B], 0.1, 0.1, 0.0).after_chain([A, B], 0.1, 3.2, 1.0)
    assert rate(tracks, A, 1.0) == rate(tracks, B, 1.0) == 2.0


def test_it_is_forgotten_in_time_and_bounded() -> None:
    tracks = TrackRecords().after_chain([A], 0.1, 1.6, 0.0)
    assert rate(tracks, A, 0.0) == 4.0
    assert rate(tracks, A, FORGET_S) == 16.0
    assert rate(tracks, A, 5 * FORGET_S) == 64.0
    for _ in range(100):
        tracks = tracks.after_chain([A], 1e-9, 1e9, 0.0)
    assert tracks.by_peer[A].factor == MAX_FACTOR
