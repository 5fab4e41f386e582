"""Frames against every way in which bytes can arrive, and against bytes that are none."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadFrame
from plait.wire import Frame, FrameLimits, FrameReader, encode_frame, frame_bytes
from plait.wire.frame import SCRATCH_BYTES

LIMITS = FrameLimits(max_header_bytes=1 << 18, max_buffers=8, max_bytes=1 << 22)
SMALL = FrameLimits(max_header_bytes=64, max_buffers=2, max_bytes=256)


def encoded(header: bytes, buffers: tuple[bytes, ...]) -> bytes:
    return b"".join(encode_frame(header, buffers))


def read(reader: FrameReader, stream: bytes, cuts: list[int]) -> list[Frame]:
    """What comes out when the stream arrives in pieces of these lengths, over and over."""
    frames: list[Frame] = []
    left = memoryview(stream)
    turn = 0
    while left:
        room = reader.get_buffer()
        count = min(len(room), len(left), cuts[turn % len(cuts)])
        room[:count] = left[:count]
        left = left[count:]
        turn += 1
        reader.received(count)
        while (frame := reader.next_frame()) is not None:
            frames.append(frame)
    return frames


contents = st.tuples(st.binary(max_size=300), st.lists(st.binary(max_size=5000), max_size=8).map(tuple))
pieces = st.lists(st.integers(1, 9000), min_size=1, max_size=8)


@given(st.lists(contents, max_size=12), pieces)
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    sent: list[tuple[bytes, tuple[bytes, ...]]], cuts: list[int]
) -> None:
    frames = read(FrameReader(LIMITS), b"".join(encoded(*content) for content in sent), cuts)
    assert [(frame.header, tuple(map(bytes, frame.buffers))) for frame in frames] == sent
    assert [frame.size_bytes for frame in frames] == [len(encoded(*content)) for content in sent]


@given(
    st.lists(st.sampled_from([0, 1, SCRATCH_BYTES - 1, SCRATCH_BYTES, SCRATCH_BYTES * 3 + 5]), max_size=4),
    st.sampled_from([0, SCRATCH_BYTES, SCRATCH_BYTES * 2]),
    st.lists(st.integers(1000, 1 << 18), min_size=1, max_size=4),
)
def test_frames_longer_than_a_read_come_out_too(sizes: list[int], header_bytes: int, cuts: list[int]) -> None:
    buffers = tuple(bytes([number + 1]) * size for number, size in enumerate(sizes))
    stream = encoded(b"h" * header_bytes, buffers) * 2
    frames = read(FrameReader(LIMITS), stream, cuts)
    assert [(len(frame.header), tuple(map(bytes, frame.buffers))) for frame in frames] == [
        (header_bytes, buffers)
    ] * 2


@given(st.lists(contents, min_size=1, max_size=4), st.integers(0), st.binary(min_size=1, max_size=40), pieces)
def test_damage_is_refused_or_stays_within_the_limits(
    sent: list[tuple[bytes, tuple[bytes, ...]]], place: int, damage: bytes, cuts: list[int]
) -> None:
    stream = b"".join(encoded(*content) for content in sent)
    place %= len(stream)
    reader = FrameReader(SMALL)
    try:
        frames = read(reader, stream[:place] + damage + stream[place + len(damage) :], cuts)
    except BadFrame:
        return
    for frame in frames:
        assert len(frame.header) <= SMALL.max_header_bytes
        assert len(frame.buffers) <= SMALL.max_buffers
        assert frame.size_bytes <= SMALL.max_bytes


@given(st.binary(max_size=2000), pieces)
def test_noise_is_no_frame(noise: bytes, cuts: list[int]) -> None:
    if not noise.startswith(b"plt\x01"[: len(noise)]):
        with pytest.raises(BadFrame):
            read(FrameReader(LIMITS), noise + bytes(12), cuts)


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        (struct.pack("<3sBII", b"PLT", 1, 0, 0), "not a frame"),
        (struct.pack("<3sBII", b"plt", 2, 0, 0), "version 2; this side reads version 1"),
        (struct.pack("<3sBII", b"plt", 1, 0, 65), "header of 65 bytes; at most 64"),
        (struct.pack("<3sBII", b"plt", 1, 3, 0), "3 buffers; at most 2"),
        (struct.pack("<3sBIIII", b"plt", 1, 2, 0, 200, 37), "257 bytes; at most 256"),
        (struct.pack("<3sBIIII", b"plt", 1, 2, 0, 2**32 - 1, 2**32 - 1), "at most 256"),
    ],
)
def test_a_frame_beyond_the_limits_is_refused_by_name(prefix: bytes, reason: str) -> None:
    with pytest.raises(BadFrame, match=reason):
        read(FrameReader(SMALL), prefix, [1])


def test_frames_before_a_bad_one_are_delivered() -> None:
    reader = FrameReader(SMALL)
    stream = encoded(b"one", ()) + encoded(b"two", ()) + b"rubbish that is none"
    room = reader.get_buffer()
    room[: len(stream)] = stream
    reader.received(len(stream))
    assert [reader.next_frame(), reader.next_frame()] == [Frame(b"one", (), 15), Frame(b"two", (), 15)]
    with pytest.raises(BadFrame):
        reader.next_frame()


def test_the_limits_of_a_frame_are_exact() -> None:
    fits = encoded(b"", (bytes(SMALL.max_bytes - frame_bytes(0, [0])),))
    assert len(fits) == SMALL.max_bytes
    assert len(read(FrameReader(SMALL), fits, [7])) == 1
    with pytest.raises(BadFrame, match="257 bytes"):
        read(FrameReader(SMALL), encoded(b"", (bytes(SMALL.max_bytes + 1 - frame_bytes(0, [0])),)), [7])


def test_limits_may_be_raised_between_frames() -> None:
    reader = FrameReader(SMALL)
    assert len(read(reader, encoded(b"small", ()), [100])) == 1
    reader.limits = LIMITS
    assert len(read(reader, encoded(bytes(1000), (bytes(100_000),)), [5000])) == 1


def test_only_contiguous_buffers_can_be_sent() -> None:
    with pytest.raises(BadFrame, match="C-contiguous"):
        encode_frame(b"", [memoryview(bytes(8))[::2]])
    assert b"".join(encode_frame(b"", [memoryview(bytes(8)).cast("d")]))[-8:] == bytes(8)
