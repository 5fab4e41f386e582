"""The iroh library as its Python binding offers it, with one function of the binding replaced.

The binding is generated. What it hands to the library it copies byte by byte, a few MiB a second, for which a single
`memmove` does. Replacing that reaches into the binding's own class for a buffer, so it is done for the version that it
was written for, and checked by handing a buffer over and looking at what is in it.
"""

import ctypes
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Any

from plait.errors import BadSetup

VERSION = "1.2.0"


@cache
def load_iroh() -> Any:
    """The binding, ready for use.

    Raises:
        BadSetup: it is not installed, or is of another version.
    """
    try:
        binding: Any = import_module("iroh.iroh_ffi")
    except ImportError:
        raise BadSetup(
            "iroh:// addresses need a library that is not installed: pip install 'plait[iroh]'"
        ) from None
    found = version("iroh")
    if found != VERSION:
        raise BadSetup(
            f"iroh {found} is installed, and plait works with {VERSION}: pip install 'plait[iroh]'"
        )
    binding._UniffiRustBufferBuilder.write = _write
    sample = bytes(range(256)) * 3
    buffer = binding._UniffiFfiConverterBytes.lower(sample)
    handed_over = bytes(buffer.data[: buffer.len])
    buffer.free()
    if handed_over != len(sample).to_bytes(4, "big") + sample:
        raise BadSetup(f"iroh {found} does not take buffers as plait hands them over; install it again")
    return binding


def _write(builder: Any, value: bytes) -> None:
    """Append to a buffer of the library's."""
    with builder._reserve(len(value)):
        end = ctypes.cast(builder.rbuf.data, ctypes.c_void_p).value + builder.rbuf.len  # pyright: ignore[reportOptionalOperand]  # never null: 16 bytes at least
        ctypes.memmove(end, value, len(value))
