"""Lets PETALS' main branch import the hivemind of the package index, 1.1.12; runs in PETALS' environment.

It was written for a commit between releases, whose packages also exported what their modules define. Here those names
are put back for this process; no file of either is changed.
"""

import builtins
import importlib
import os
import pkgutil
from types import ModuleType

# Where the names of a package's modules were exported: in the package, and at the top.
_PACKAGES = ("compression", "dht", "moe", "p2p", "utils")

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def restore_names() -> None:
    """Call it before the first `import petals`."""
    top = importlib.import_module("hivemind")
    for name in _PACKAGES:
        package = importlib.import_module(f"hivemind.{name}")
        _export(package, top)
        for found in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"hivemind.{name}.{found.name}")
            _export(module, package)
            _export(module, top)
    # It had its own before Python did.
    importlib.import_module("hivemind.utils.asyncio").anext = builtins.anext
    top.anext = builtins.anext


def _export(source: ModuleType, target: ModuleType) -> None:
    for name, value in vars(source).items():
        if not name.startswith("_") and not hasattr(target, name):
            setattr(target, name, value)
