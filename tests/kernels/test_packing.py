"""Packing puts rows where they were asked for, on every instruction set alike, and refuses what it cannot pack."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from plait.kernels import isa_names, native_available

if not native_available:
    pytest.skip("plait was installed without its CPU kernels", allow_module_level=True)

from plait.kernels._native import Arena, pack_into, packed_bytes, unpack_from

FORMATS = {"bf16": 0, "int8": 1, "int4": 2, "int4-g128": 3}


def packed(source: Any, rows: np.ndarray, format: int = 0, **options: Any) -> Arena:
    """An arena of exactly one packed matrix."""
    depth = options.pop("depth", source.shape[1])
    arena = Arena(packed_bytes(format, len(rows), depth))
    asked = {"offset": 0, "depth_begin": 0, "depth": depth, "format": format, "threads": 1, **options}
    pack_into(out=arena.memory, source=source, rows=rows, **asked)
    return arena


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", [1, 31, 32, 200])
def test_columns_are_the_rows_that_were_named(dtype: torch.dtype, depth: int) -> None:
    generator = np.random.default_rng(0)
    wide = torch.randn(50, depth + 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    source = wide[:, 3 : depth + 13]  # rows lie apart
    rows = generator.integers(-1, 50, 192)
    arena = packed(source, rows, depth_begin=5, depth=depth)
    unpacked = unpack_from(arena.memory, 0, 192, depth, 0)
    expected = source[:, 5 : 5 + depth].bfloat16().float().numpy()[rows]
    expected[rows < 0] = 0
    np.testing.assert_array_equal(unpacked, expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("depth", [96, 130])
def test_every_instruction_set_packs_and_unpacks_the_same(format: str, depth: int) -> None:
    source = np.random.default_rng(2).standard_normal((70, depth)).astype(np.float32)
    rows = np.concatenate([np.arange(70), np.full(58, -1)])
    arenas = [packed(source, rows, FORMATS[format], isa=isa) for isa in isa_names()]
    values = [unpack_from(arenas[0].memory, 0, 70, depth, FORMATS[format], isa=isa) for isa in isa_names()]
    assert all(np.array_equal(arena.memory, arenas[0].memory) for arena in arenas)
    assert all(np.array_equal(each, values[0]) for each in values)


@pytest.mark.parametrize("format", FORMATS)
def test_the_bytes_do_not_depend_on_what_was_there_or_on_the_threads(format: str) -> None:
    source = np.random.default_rng(3).standard_normal((640, 256)).astype(np.float32)
    rows = np.where(np.arange(640) % 5 == 0, -1, np.arange(640))
    clean = packed(source, rows, FORMATS[format])
    dirty = Arena(clean.memory.size + 64)
    dirty.memory[:] = 0xA5
    pack_into(
        out=dirty.memory,
        offset=64,
        source=source,
        rows=rows,
        depth_begin=0,
        depth=256,
        format=FORMATS[format],
        threads=7,
    )
    np.testing.assert_array_equal(dirty.memory[64:], clean.memory)
    assert (dirty.memory[:64] == 0xA5).all()


SOURCE = np.ones((64, 32), np.float32)
ROWS = np.arange(64)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: packed(SOURCE, ROWS, offset=64), "takes 4096 bytes, more than"),
        (lambda: packed(SOURCE, ROWS, offset=-64), "more than"),
        (lambda: packed(SOURCE, np.arange(65) - 1), "whole panels of 64"),
        (lambda: packed(SOURCE, ROWS + 1), "no row 64"),
        (lambda: packed(SOURCE, ROWS - 2), "no row -2"),
        (lambda: packed(SOURCE, ROWS, depth_begin=1), "do not lie in a source of 32"),
        (lambda: packed(SOURCE, ROWS, depth_begin=-1), "do not lie in a source of 32"),
        (lambda: packed(SOURCE, ROWS, threads=0), "at least one thread"),
        (lambda: packed(SOURCE, ROWS, isa="z80"), "no instruction set 'z80'"),
        (lambda: packed(SOURCE.astype(np.float64), ROWS), "bfloat16 or float32"),
        (lambda: packed(np.ones((32, 64), np.float32).T, ROWS), "side by side"),
        (lambda: packed_bytes(4, 64, 32), "no weight format 4"),
        (lambda: packed_bytes(0, 0, 32), "cannot be packed"),
        (lambda: packed_bytes(0, 64, 2**40), "cannot be packed"),
        (lambda: unpack_from(Arena(8192).memory, 32, 64, 32, 0), "aligned to 64 bytes"),
        (lambda: unpack_from(Arena(4096).memory, 0, 65, 32, 0), "more than"),
    ],
)
def test_what_cannot_be_packed_is_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
