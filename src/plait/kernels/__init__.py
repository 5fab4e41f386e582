"""The CPU kernels: a C++ extension (csrc/) with one table of functions for each set of instructions, chosen at start.

_native   the extension: _native.pyi says what its functions take, csrc/table.h what they mean; it is absent where
          there was no C++ compiler when plait was installed, and torch computes instead

`PLAIT_ISA=<name>` takes another table than the best, `PLAIT_NATIVE=0` does without the extension: both for tests and
comparisons.
"""

import functools
import importlib
import logging
import os

from plait.errors import BadSetup

__all__ = ["current_isa", "isa_names", "native_available", "use_native"]

log = logging.getLogger(__name__)

_turned_off = os.environ.get("PLAIT_NATIVE") == "0"
_import_error = ""
if not _turned_off:
    try:
        importlib.import_module("plait.kernels._native")
    except ImportError as error:  # built for another Python or C++ library, or not built
        _import_error = str(error)

native_available: bool = not _turned_off and not _import_error
"""Whether `plait.kernels._native` can be imported and may be used."""


def use_native() -> bool:
    """Tell whether the kernels can be used, for a caller that would; where they are missing the log says so, once."""
    if _import_error:
        _warn_once()
    return native_available


def isa_names() -> tuple[str, ...]:
    """The instruction sets that were built and run on this machine, best first; none without the extension."""
    if not native_available:
        return ()
    from plait.kernels import _native

    return tuple(_native.isa_names())


def current_isa() -> str:
    """The instruction set in use.

    Raises:
        BadSetup: PLAIT_ISA names one that is not available, or there is no extension.
    """
    if not native_available:
        raise BadSetup(_what_is_missing())
    from plait.kernels import _native

    try:
        return _native.current_isa()
    except ValueError as error:
        raise BadSetup(str(error)) from None


@functools.cache
def _warn_once() -> None:
    log.warning("%s", _what_is_missing())


def _what_is_missing() -> str:
    if _turned_off:
        return "the CPU kernels are turned off by PLAIT_NATIVE=0; unset it to use them"
    return (
        "plait was installed without its CPU kernels, so torch computes on the CPU: several times slower, and with no "
        "int8 or int4 weights; install a C++ compiler (GCC 12 or Clang 15, or newer) and then plait again "
        f"({_import_error})"
    )
