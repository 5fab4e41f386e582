"""The policies by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from plait.errors import BadSetup
from plait.scheduling.paged import PagedPolicy
from plait.scheduling.plan import SchedulingPolicy
from plait.scheduling.reserved import OrcaPolicy, StaticPolicy

_POLICIES: Mapping[str, Callable[[], SchedulingPolicy]] = MappingProxyType(
    {"static": StaticPolicy, "orca": OrcaPolicy, "paged": PagedPolicy}
)

POLICY_NAMES: tuple[str, ...] = tuple(_POLICIES)


def policy_named(name: str) -> SchedulingPolicy:
    """A policy by its name.

    Raises:
        BadSetup: there is none; the message lists those there are.
    """
    if name not in _POLICIES:
        raise BadSetup(f"no scheduling policy {name!r}; choose one of {', '.join(POLICY_NAMES)}")
    return _POLICIES[name]()
