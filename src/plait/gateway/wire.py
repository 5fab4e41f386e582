"""What request bodies are made of: exact types, and errors that stay small."""

from pydantic import BaseModel, ConfigDict, FailFast


class WireModel(BaseModel):
    """A JSON object from a client: exact types, unknown fields ignored (clients are newer than servers)."""

    model_config = ConfigDict(
        strict=True, extra="ignore", frozen=True, protected_namespaces=(), populate_by_name=True
    )


class FirstError(FailFast):
    """Annotates a list that is given up at its first wrong item: a client may send a million of them.

    Hashable, so that it can stand inside a union.
    """

    def __hash__(self) -> int:
        return hash(type(self))
