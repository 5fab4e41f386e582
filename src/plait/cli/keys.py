"""`plait token`: API keys, shown once and kept as hashes.

The file is XDG_CONFIG_HOME/plait/keys.json, readable by its owner alone; a server reads it when it starts.
"""

import json as jsonlib
import os
import secrets
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from plait.cli.terminal import JsonFlag, note, print_json, print_table, say
from plait.errors import BadSetup


@dataclass(frozen=True, slots=True)
class StoredKey:
    """What is kept of a key; `id` names it to people."""

    id: str
    name: str
    created: str
    hash: str


class KeyStore:
    """The keys of one file.

    Raises (every method):
        BadSetup: the file cannot be read or written, or is not one of ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> tuple[StoredKey, ...]:
        """The keys kept, oldest first; none if there is no file."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise BadSetup(f"the key file {str(self.path)!r} cannot be read: {error.strerror}") from error
        try:
            return tuple(StoredKey(**cast(dict[str, Any], key)) for key in jsonlib.loads(text)["keys"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadSetup(
                f"the key file {str(self.path)!r} is damaged ({error}); remove it and create new keys"
            ) from error

    def add(self, name: str) -> tuple[str, StoredKey]:
        """Make a key; the only time it is seen in clear."""
        from plait.gateway import hash_api_key, new_api_key

        key = new_api_key()
        created = datetime.now(UTC).isoformat(timespec="seconds")
        stored = StoredKey(secrets.token_hex(4), name, created, hash_api_key(key))
        self._save((*self.load(), stored))
        return key, stored

    def revoke(self, id: str) -> StoredKey:
        """Forget a key, named by its id or by a name that only one has."""
        keys = self.load()
        named = [key for key in keys if id in (key.id, key.name)]
        if len(named) != 1:
            problem = "no key has" if not named else f"{len(named)} keys have"
            raise BadSetup(f"{problem} the id or name {id!r}; 'plait token list' shows them")
        self._save([key for key in keys if key is not named[0]])
        return named[0]

    def _save(self, keys: Sequence[StoredKey]) -> None:
        """Replace the file in one step, so that a server never reads half of it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=stat.S_IRWXU)
            # mkstemp makes files that their owner alone can read.
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".keys-")
            with os.fdopen(handle, "w") as file:
                jsonlib.dump({"keys": [asdict(key) for key in keys]}, file, indent=2)
            os.replace(temporary, self.path)
        except OSError as error:
            raise BadSetup(f"the key file {str(self.path)!r} cannot be written: {error.strerror}") from error


def default_key_store() -> KeyStore:
    """The store of this user."""
    config_home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return KeyStore(Path(config_home).expanduser() / "plait" / "keys.json")


token = typer.Typer(no_args_is_help=True, help="API keys of this machine's servers: create, list, revoke.")


@token.command("new")
def new_token(
    name: Annotated[str, typer.Option("--name", help="Who or what the key is for.")] = "",
    json: JsonFlag = False,
) -> None:
    """Create a key and show it, this once."""
    store = default_key_store()
    key, stored = store.add(name)
    if json:
        print_json({"id": stored.id, "name": stored.name, "created": stored.created, "key": key})
        return
    say(key)
    note(
        f"kept as a hash in {store.path}; it cannot be shown again. "
        "Servers started from now on ask for a key."
    )


@token.command("list")
def list_tokens(json: JsonFlag = False) -> None:
    """List the keys, without the keys themselves."""
    keys = default_key_store().load()
    if json:
        print_json([{"id": key.id, "name": key.name, "created": key.created} for key in keys])
    elif keys:
        print_table(("id", "name", "created"), [(key.id, key.name or "-", key.created) for key in keys])
    else:
        note("no keys; 'plait token new' creates one")


@token.command("revoke")
def revoke_token(id: Annotated[str, typer.Argument(help="Its id or name.")]) -> None:
    """Forget a key. Running servers accept it until they are restarted."""
    stored = default_key_store().revoke(id)
    say(f"revoked {stored.id} {stored.name}".rstrip())
