"""The `type` by which the parts of a message tell their kind."""

from collections.abc import Mapping
from typing import Any, cast


def content_type(value: Any, default: str = "") -> str:
    """The type of a part, as JSON or already parsed; `default` if it has none that is a string."""
    if isinstance(value, Mapping):
        kind: object = cast(Mapping[str, object], value).get("type", default)
    else:
        kind = getattr(value, "type", default)
    return kind if isinstance(kind, str) else default
