"""A model's folder that is filled piece by piece: sparse files of the full sizes, and a note of which pieces are there.

The checkpoint reader needs headers, names and sizes only, so it opens such a folder like any other. Who loads blocks
from it makes sure first that their pieces are there: what is not reads as zeros. That is why nothing but this package
takes such a folder for a model (`engine.resolve_model` refuses it).
"""

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, cast

from plait.engine import PARTIAL_MARKER, Checkpoint
from plait.errors import BadSetup
from plait.wire import PIECE_BYTES

WEIGHT_SUFFIX = ".safetensors"
MAX_SIDE_FILE_BYTES = 128 << 20
# As the safetensors library has it.
MAX_HEADER_BYTES = 100_000_000
# Folders of one model for processes that run at the same time on one machine.
MAX_FOLDERS = 16
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")

Piece = tuple[str, int]
"""A file and the number of one of its pieces."""


def pieces_of(file: str, start_bytes: int, end_bytes: int) -> Iterator[Piece]:
    """The pieces that hold these bytes of a file."""
    for number in range(start_bytes // PIECE_BYTES, -(-end_bytes // PIECE_BYTES)):
        yield file, number


def span_pieces(checkpoint: Checkpoint, blocks: range) -> tuple[Piece, ...]:
    """The pieces that hold the tensors of a span, by file and place."""
    found: set[Piece] = set()
    for planned in checkpoint.plan(blocks).tensors:
        for name, _ in planned.stored():
            stored = checkpoint.tensors[name]
            end_bytes = stored.offset_bytes + stored.size_bytes
            found.update(pieces_of(stored.file.name, stored.offset_bytes, end_bytes))
    return tuple(sorted(found))


class WeightFolder:
    """One process's folder of one model; enter it to own it, leave it to let others have it.

    `files`: names and sizes of all the model's files. A folder that an earlier process left is continued.

    Raises:
        BadSetup: the disk does not let us, or the files' names or sizes are not those of a model.
    """

    def __init__(self, root: Path, fingerprint: str, files: Mapping[str, int]) -> None:
        for name, size_bytes in files.items():
            if not _FILE_NAME.fullmatch(name) or name == PARTIAL_MARKER:
                raise BadSetup(f"{name!r} is no name of a model's file")
            if not name.endswith(WEIGHT_SUFFIX) and size_bytes > MAX_SIDE_FILE_BYTES:
                raise BadSetup(f"{name!r} is said to have {size_bytes} bytes, more than such a file ever has")
        if not re.fullmatch(r"[0-9a-f]{8,64}", fingerprint):
            raise BadSetup(f"{fingerprint!r} is no fingerprint of a model")
        self.files = dict(files)
        self.fingerprint = fingerprint
        self.path = root / fingerprint
        self._root = root
        self._there: dict[str, bytearray] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> "WeightFolder":
        try:
            self._take()
            self._read_note()
            for name, size_bytes in self.files.items():
                with (self.path / name).open("ab") as file:
                    file.truncate(size_bytes)
        except OSError as error:
            self.__exit__()
            raise BadSetup(
                f"cannot keep weights in {self._root}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be "
                "written"
            ) from error
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def pieces(self, file: str) -> int:
        """How many pieces a file has."""
        return -(-self.files[file] // PIECE_BYTES)

    def piece_bytes(self, piece: Piece) -> int:
        """The length of a piece."""
        file, number = piece
        return min(PIECE_BYTES, self.files[file] - number * PIECE_BYTES)

    def holds(self, piece: Piece) -> bool:
        """Whether a piece has come."""
        file, number = piece
        there = self._there.get(file)
        return there is not None and number < len(there) and there[number] == 1

    def lacks(self, pieces: Iterable[Piece]) -> tuple[Piece, ...]:
        """Those that have not come yet, in their order."""
        return tuple(piece for piece in pieces if not self.holds(piece))

    def side_pieces(self) -> tuple[Piece, ...]:
        """All pieces of what are not weights: configuration, index, tokenizer."""
        return tuple(
            piece
            for name, size_bytes in sorted(self.files.items())
            if not name.endswith(WEIGHT_SUFFIX)
            for piece in pieces_of(name, 0, size_bytes)
        )

    def first_pieces(self) -> tuple[Piece, ...]:
        """The first piece of every weight file: it says how long the file's header is."""
        return tuple((name, 0) for name in sorted(self.files) if name.endswith(WEIGHT_SUFFIX))

    def header_pieces(self) -> tuple[Piece, ...]:
        """The pieces of the headers of all weight files, whose first pieces are there.

        Raises:
            BadSetup: that is no header of a weight file.
        """
        found: list[Piece] = []
        for name, _ in self.first_pieces():
            with (self.path / name).open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > min(MAX_HEADER_BYTES, self.files[name] - 8):
                raise BadSetup(f"{name!r}, as peers have it, is no safetensors file")
            found.extend(pieces_of(name, 0, 8 + header_bytes))
        return tuple(found)

    def write(self, piece: Piece, data: memoryview) -> None:
        """Put a whole piece that has been verified to its place."""
        file, number = piece
        assert len(data) == self.piece_bytes(piece)
        with (self.path / file).open("r+b") as stream:
            stream.seek(number * PIECE_BYTES)
            stream.write(data)
        self._there.setdefault(file, bytearray(self.pieces(file)))[number] = 1

    def note(self) -> None:
        """Let a later start know which pieces are there, once they are on the disk."""
        for name in self._there:
            with (self.path / name).open("rb") as stream:
                os.fsync(stream.fileno())
        note = {
            "fingerprint": self.fingerprint,
            "files": self.files,
            "pieces": {name: "".join(str(bit) for bit in there) for name, there in self._there.items()},
        }
        temporary = self.path / (PARTIAL_MARKER + ".new")
        temporary.write_text(json.dumps(note))
        os.replace(temporary, self.path / PARTIAL_MARKER)

    def _take(self) -> None:
        """Own the first folder of this model that no other process owns."""
        names = [self.fingerprint, *(f"{self.fingerprint}-{number}" for number in range(2, MAX_FOLDERS))]
        for name in names:
            path = self._root / name
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("a")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                continue
            self.path, self._lock = path, lock
            return
        raise BadSetup(f"{len(names)} processes have folders of this model in {self._root} already")

    def _read_note(self) -> None:
        """Believe a note that is about these very files; otherwise begin anew."""
        self._there = {}
        try:
            note: object = json.loads((self.path / PARTIAL_MARKER).read_text())
            fields = cast(Mapping[str, object], note)
            if fields["fingerprint"] != self.fingerprint or fields["files"] != self.files:
                raise ValueError("of other files")
            pieces = cast(Mapping[str, str], fields["pieces"])
            for name, bits in pieces.items():
                if name not in self.files or len(bits) != self.pieces(name) or set(bits) - {"0", "1"}:
                    raise ValueError("damaged")
                if (self.path / name).stat().st_size == self.files[name]:
                    self._there[name] = bytearray(int(bit) for bit in bits)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._there = {}
            for name in self.files:
                (self.path / name).unlink(missing_ok=True)
            (self.path / PARTIAL_MARKER).write_text(
                json.dumps({"fingerprint": self.fingerprint, "files": self.files, "pieces": {}})
            )


class HeldFiles:
    """The files of a model that this member can give: of a whole checkpoint, or of a folder that is being filled."""

    def __init__(self, folder: Path, files: Mapping[str, int], filling: WeightFolder | None = None) -> None:
        self.folder = folder
        self.files = dict(files)
        self._filling = filling

    @staticmethod
    def of_checkpoint(checkpoint: Checkpoint, side_files: Sequence[str]) -> "HeldFiles":
        """All files of a complete checkpoint."""
        names = {stored.file.name for stored in checkpoint.tensors.values()} | set(side_files)
        return HeldFiles(
            checkpoint.folder, {name: (checkpoint.folder / name).stat().st_size for name in sorted(names)}
        )

    @staticmethod
    def of_folder(folder: WeightFolder) -> "HeldFiles":
        """What has come of a folder so far, and what comes later."""
        return HeldFiles(folder.path, folder.files, folder)

    def has(self, piece: Piece) -> bool:
        """Whether a piece can be given."""
        file, number = piece
        if file not in self.files or number * PIECE_BYTES >= self.files[file]:
            return False
        return self._filling is None or self._filling.holds(piece)

    def read(self, file: str, offset_bytes: int, size_bytes: int) -> bytes:
        """Bytes of a file, fewer at its end.

        Raises:
            OSError: it cannot be read.
        """
        with (self.folder / file).open("rb") as stream:
            stream.seek(offset_bytes)
            return stream.read(size_bytes)
