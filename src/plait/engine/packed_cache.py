"""Packed weights on disk, so that only the first start of a model packs them.

A file is `magic, header length, header (JSON), padding to a page, the arena's bytes`. The header says what the bytes
were made from (`content`, compared whole), which model folder that was (for people), and the SHA-256 of every piece,
which reading verifies as it goes: what is wrong in any way is never used, but made again. Nothing in a file is code.

The files of a model are beside it in `.plait`, or in this user's cache if nothing can be written there. They may be
deleted at any time; a server that runs has its own copy in memory.
"""

import hashlib
import json
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from plait.engine.checkpoint import Checkpoint
from plait.errors import BadSetup
from plait.units import format_bytes

log = logging.getLogger(__name__)

Memory = np.ndarray[Any, np.dtype[np.uint8]]

LAYOUT_VERSION = 1
"""Of the file, and of where packed.py puts things; the kernels' own layouts are recognised by what they produce."""

FOLDER = ".plait"
SUFFIX = ".packed"
_UNFINISHED_SUFFIX = ".part"
# A file that is still being written is younger than this.
_UNFINISHED_MAX_S = 3600.0

_MAGIC = b"plaitpkd"
_PAGE_BYTES = 4096
# A mixture of 128 experts in 96 blocks has entries of 2 MB.
_MAX_HEADER_BYTES = 64 * 2**20
# What one hash covers, and the unit of work of a thread.
_PIECE_BYTES = 16 * 2**20
# Read and hashed at a time, so that the hash finds it in the core's own cache.
_READ_BYTES = 2**19
# Bytes left free on the disk.
_DISK_RESERVE_BYTES = 256 * 2**20
# Smaller models are packed about as fast as they are verified.
_MIN_SOURCE_BYTES = 64 * 2**20


def packed_cache_folder(checkpoint: Checkpoint) -> Path | None:
    """Where a model's packed weights are kept; None if it is so small that they need not be."""
    if sum(stored.size_bytes for stored in checkpoint.tensors.values()) < _MIN_SOURCE_BYTES:
        return None
    beside = folder_beside(checkpoint.folder)
    if beside.is_dir():
        usable = os.access(beside, os.W_OK) or any(_packed_files(beside))
    else:
        usable = os.access(checkpoint.folder, os.W_OK)
    return beside if usable else user_cache_folder()


def user_cache_folder() -> Path:
    """Where this user's programs keep what can be made again: XDG_CACHE_HOME, or the system's own place."""
    home = os.environ.get("XDG_CACHE_HOME")
    if not home:
        home = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA", "~")}.get(
            sys.platform, "~/.cache"
        )
    return Path(home).expanduser() / "plait" / "packed"


def folder_beside(model_folder: Path) -> Path:
    """Where a model's packed weights are kept if its folder can be written."""
    return model_folder / FOLDER


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptWeights:
    """A file of packed weights, as its header describes it; without a model folder and content if it is damaged."""

    path: Path
    size_bytes: int
    model_folder: Path | None
    content: Mapping[str, object]

    def remove(self) -> None:
        """Delete the file.

        Raises:
            BadSetup: it cannot be deleted.
        """
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise BadSetup(f"{str(self.path)!r} cannot be removed: {error.strerror}") from None


def kept_weights(folder: Path) -> tuple[KeptWeights, ...]:
    """The packed weights in a folder, by name."""
    found: list[KeptWeights] = []
    for path in _packed_files(folder):
        try:
            size_bytes = path.lstat().st_size
        except OSError:
            continue  # deleted since it was listed
        model_folder: Path | None = None
        content: Mapping[str, object] = {}
        try:
            with _opened(path) as descriptor:
                header, _ = _read_header(descriptor)
            model_folder, content = Path(str(header.get("model_folder", ""))), _content_of(header)
        except (OSError, _Unusable):
            pass  # listed as damaged
        found.append(
            KeptWeights(path=path, size_bytes=size_bytes, model_folder=model_folder, content=content)
        )
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFile:
    """One model's packed weights; `content` (JSON values) says what their bytes depend on."""

    folder: Path
    name: str
    model_folder: Path
    content: Mapping[str, object]

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def read(
        self, memory: Memory, *, threads: int, on_progress: Callable[[int, int], None] | None = None
    ) -> bool:
        """Fill `memory` and tell whether it holds what was packed; an unusable file is deleted, and the log says so."""
        try:
            with _opened(self.path) as descriptor:
                header, data_start_bytes = _read_header(descriptor)
                digests = self._checked_digests(header, descriptor, data_start_bytes, memory)
                _read_pieces(descriptor, data_start_bytes, memory, digests, threads, on_progress)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (_Unusable, OSError) as error:
            log.warning(
                "the packed weights in %r cannot be used and are made again: %s",
                str(self.path),
                _reason(error),
            )
            _remove(self.path)
            return False
        return True

    def write(self, memory: Memory, *, threads: int) -> None:
        """Keep `memory` on the disk, in one step for whoever reads; a failure is a warning, since nothing is lost."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_outdated()
            free_bytes = shutil.disk_usage(self.folder).free
            if free_bytes < memory.size + _DISK_RESERVE_BYTES:
                log.warning(
                    "the packed weights are not kept: they take %s and the disk of %r has %s left",
                    format_bytes(memory.size),
                    str(self.folder),
                    format_bytes(free_bytes),
                )
                return
            descriptor, temporary = tempfile.mkstemp(dir=self.folder, suffix=_UNFINISHED_SUFFIX)
            try:
                # Who may read the model may read this, and nobody else.
                os.fchmod(descriptor, stat.S_IRUSR | stat.S_IWUSR | _reading_mode(self.model_folder))
                self._write_all(descriptor, memory, threads)
                os.replace(temporary, self.path)
            finally:
                os.close(descriptor)
                _remove(Path(temporary))  # nothing is there if it has become the file
        except OSError as error:
            log.warning("the packed weights are not kept in %r: %s", str(self.folder), _reason(error))

    def _checked_digests(
        self, header: Mapping[str, object], descriptor: int, data_start_bytes: int, memory: Memory
    ) -> Sequence[str]:
        """The hashes of the pieces, of a file that was made from what it should be and is complete."""
        wanted, found = _content_of({"content": self.content}), _content_of(header)
        if found != wanted:
            other = next((name for name, value in wanted.items() if found.get(name) != value), "content")
            raise _Unusable(f"their {other.replace('_', ' ')} is not that of this model now")
        digests = header.get("sha256")
        if not isinstance(digests, list) or len(cast(list[object], digests)) != _pieces(memory):
            raise _Unusable("its header is damaged")
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes != data_start_bytes + memory.size:
            raise _Unusable(f"it has {size_bytes} bytes instead of {data_start_bytes + memory.size}")
        return cast(list[str], digests)

    def _write_all(self, descriptor: int, memory: Memory, threads: int) -> None:
        """Hash and write the pieces, then the header in front of them, whose length is known before."""
        data_start_bytes = _page_up(16 + len(self._header(["0" * 64] * _pieces(memory))))

        def write_piece(index: int) -> str:
            piece = memory[index * _PIECE_BYTES : (index + 1) * _PIECE_BYTES]
            digest = hashlib.sha256()
            for start in range(0, len(piece), _READ_BYTES):
                part = piece[start : start + _READ_BYTES].data
                digest.update(part)
                _write_at(descriptor, part, data_start_bytes + index * _PIECE_BYTES + start)
            return digest.hexdigest()

        with ThreadPoolExecutor(threads) as pool:
            header = self._header(list(pool.map(write_piece, range(_pieces(memory)))))
        start = _MAGIC + len(header).to_bytes(8, "little") + header
        _write_at(descriptor, memoryview(start), 0)

    def _header(self, digests: Sequence[str]) -> bytes:
        header = {
            "model_folder": str(self.model_folder.absolute()),
            "content": self.content,
            "sha256": digests,
        }
        return json.dumps(header).encode()

    def _remove_outdated(self) -> None:
        """Delete what this model's folder was packed to while it held something else, and what nobody finished."""
        current = _content_of({"content": self.content})
        for kept in kept_weights(self.folder):
            same_folder = kept.model_folder == self.model_folder.absolute()
            if same_folder and any(
                kept.content.get(name) != current[name] for name in ("layout_version", "fingerprint", "files")
            ):
                log.info("removing outdated packed weights: file=%r", str(kept.path))
                _remove(kept.path)
        for path in self.folder.glob(f"*{_UNFINISHED_SUFFIX}"):
            try:
                if path.lstat().st_mtime < time.time() - _UNFINISHED_MAX_S:
                    _remove(path)
            except OSError:
                continue  # its writer was faster


class _Unusable(Exception):
    """A file that is damaged or of something else; says why."""


@contextmanager
def _opened(path: Path) -> Generator[int]:
    """A descriptor of a regular file of this user (or of root), never of what a link points to."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
    # Opening a pipe must not wait for a writer.
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _Unusable("it is not a regular file")
        if hasattr(os, "geteuid") and status.st_uid not in (os.geteuid(), 0):
            raise _Unusable(f"it belongs to user {status.st_uid}")
        yield descriptor
    finally:
        os.close(descriptor)


def _read_header(descriptor: int) -> tuple[Mapping[str, object], int]:
    """The header, and where the arena's bytes begin."""
    start = os.pread(descriptor, 16, 0)
    size_bytes = int.from_bytes(start[8:], "little")
    if len(start) < 16 or start[:8] != _MAGIC or size_bytes > _MAX_HEADER_BYTES:
        raise _Unusable("it is not a file of packed weights")
    try:
        header: object = json.loads(os.pread(descriptor, size_bytes, 16))
    except (ValueError, RecursionError):
        raise _Unusable("its header is damaged") from None
    if not isinstance(header, dict):
        raise _Unusable("its header is damaged")
    return cast(Mapping[str, object], header), _page_up(16 + size_bytes)


def _read_pieces(
    descriptor: int,
    data_start_bytes: int,
    memory: Memory,
    digests: Sequence[str],
    threads: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Read straight into `memory`, several pieces at once; hashing, like reading, lets other threads run."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, data_start_bytes, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_piece(index: int) -> int:
        start = index * _PIECE_BYTES
        end = min(start + _PIECE_BYTES, memory.size)
        digest = hashlib.sha256()
        while start < end:
            part = memory[start : min(start + _READ_BYTES, end)].data
            count = os.preadv(descriptor, [part], data_start_bytes + start)
            if count == 0:
                raise _Unusable("it ends early")
            digest.update(part[:count])
            start += count
        if digest.hexdigest() != digests[index]:
            raise _Unusable(f"its bytes from {index * _PIECE_BYTES} to {end} are damaged")
        return end

    if on_progress is not None:
        on_progress(0, memory.size)
    with ThreadPoolExecutor(threads) as pool:
        for end in pool.map(read_piece, range(_pieces(memory))):
            if on_progress is not None:
                on_progress(end, memory.size)


def _content_of(header: Mapping[str, object]) -> Mapping[str, object]:
    """What a header says its bytes were made from, with every sequence a list as JSON has it."""
    content: object = json.loads(json.dumps(header.get("content")))
    return cast(Mapping[str, object], content) if isinstance(content, dict) else {}


def _pieces(memory: Memory) -> int:
    return -(-memory.size // _PIECE_BYTES)


def _page_up(size_bytes: int) -> int:
    return -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES


def _write_at(descriptor: int, data: memoryview, offset_bytes: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset_bytes)
        data, offset_bytes = data[written:], offset_bytes + written


def _packed_files(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(folder.glob(f"*{SUFFIX}"))
    except OSError:
        return


def _reading_mode(model_folder: Path) -> int:
    """Which others may read the model's weights."""
    readable = stat.S_IRGRP | stat.S_IROTH
    for file in model_folder.glob("*.safetensors"):
        readable &= file.stat().st_mode
    return readable


def _remove(path: Path) -> None:
    with suppress(OSError):  # whoever can write here replaces it
        path.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
