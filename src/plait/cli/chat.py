"""`plait chat`: talk to a server from a terminal, or to a model started for it."""

import os
import sys
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.flags import ENGINE_SECTIONS, with_settings
from plait.cli.serving import background_server
from plait.cli.terminal import error_line, note, say, say_piece
from plait.errors import BadSetup, ServingError
from plait.settings import Settings

if TYPE_CHECKING:
    from plait.client import Message, ServerClient

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"
HELP = (
    "/reset forgets the conversation, /system TEXT sets a system prompt, /exit leaves; Ctrl-C stops an answer"
)


@with_settings(sections=ENGINE_SECTIONS, quiet=True)
def chat(
    base_url: Annotated[
        str | None,
        typer.Option("--base-url", help="A running server, such as http://127.0.0.1:8000/v1.", metavar="URL"),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", help="Key of that server.", metavar="KEY")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.", metavar="TEXT")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 is greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Longest answer.")] = None,
    *,
    settings: Settings,
) -> None:
    """Talk to a model in the terminal.

    A MODEL alone is started for this conversation. Without one, a running server is talked to: that of
    --base-url, of OPENAI_BASE_URL, or http://127.0.0.1:8000/v1. Piped standard input is one message.
    """
    given = {"temperature": temperature, "max_tokens": max_tokens}
    sampling = {name: value for name, value in given.items() if value is not None}
    with _server(settings, base_url, api_key) as client:
        conversation = Conversation(
            client, _model_name(client, settings, started=base_url is None), sampling, system
        )
        if sys.stdin.isatty():
            _talk(conversation)
        else:
            for piece in conversation.ask(sys.stdin.read().strip()):
                say_piece(piece)
            say()


class Conversation:
    """Messages so far with one model of one server."""

    def __init__(
        self, client: "ServerClient", model: str, sampling: Mapping[str, object], system: str | None = None
    ) -> None:
        self.model = model
        self._client = client
        self._sampling = sampling
        self._system = system
        self._messages: list[Message] = []

    def ask(self, question: str) -> Generator[str]:
        """Stream the answer; what has come of it is remembered even if the iterator is closed early.

        Raises:
            ServingError: the server refused or broke; the question is forgotten.
        """
        from plait.client import Message

        system = [Message("system", self._system)] if self._system else []
        asked = [*self._messages, Message("user", question)]
        pieces: list[str] = []
        try:
            with closing(
                self._client.chat([*system, *asked], model=self.model, sampling=self._sampling)
            ) as chunks:
                for chunk in chunks:
                    pieces.append(chunk.text)
                    yield chunk.text
        except (KeyboardInterrupt, GeneratorExit):
            self._messages = [*asked, Message("assistant", "".join(pieces))]
            raise
        self._messages = [*asked, Message("assistant", "".join(pieces))]

    @property
    def messages(self) -> tuple["Message", ...]:
        """What has been said, without the system prompt."""
        return tuple(self._messages)

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self._messages = []

    def set_system(self, text: str) -> None:
        """Begin anew under another system prompt; empty for none."""
        self._system = text or None
        self.reset()


@contextmanager
def _server(settings: Settings, base_url: str | None, api_key: str | None) -> Generator["ServerClient"]:
    from plait.client import ServerClient

    if base_url is None and _named_model(settings) is not None:
        with (
            background_server(settings) as (own_base_url, key),
            ServerClient(own_base_url, api_key=key) as client,
        ):
            yield client
        return
    if base_url is None and "OPENAI_BASE_URL" in os.environ:
        # The key of the environment goes only to the server of the environment.
        base_url, api_key = os.environ["OPENAI_BASE_URL"], api_key or os.environ.get("OPENAI_API_KEY")
    with ServerClient(base_url or DEFAULT_BASE_URL, api_key=api_key) as client:
        yield client


def _named_model(settings: Settings) -> str | None:
    return settings.model.name if "name" in settings.model.model_fields_set else None


def _model_name(client: "ServerClient", settings: Settings, *, started: bool) -> str:
    served = client.models()
    if not served:
        raise BadSetup(f"{client.base_url} serves no model")
    named = _named_model(settings)
    return served[0] if named is None or started else named


def _talk(conversation: Conversation) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401 # pyright: ignore[reportUnusedImport] - input() edits with it
    note(f"talking to {conversation.model}; {HELP}")
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            say()
            note("/exit or Ctrl-D leaves")
            continue
        except EOFError:
            say()
            return
        command, _, rest = line.partition(" ")
        match command:
            case "":
                continue
            case "/exit" | "/quit" | "/bye":
                return
            case "/reset":
                conversation.reset()
                note("forgotten")
            case "/system":
                conversation.set_system(rest.strip())
                note("a new conversation under that system prompt" if rest.strip() else "no system prompt")
            case "/help":
                note(HELP)
            case _ if command.startswith("/") and len(command) > 1 and command[1:].isalpha():
                note(f"{command} is not a command; {HELP}")
            case _:
                _print_answer(conversation, line)


def _print_answer(conversation: Conversation, question: str) -> None:
    try:
        with closing(conversation.ask(question)) as pieces:
            for piece in pieces:
                say_piece(piece)
    except KeyboardInterrupt:
        say_piece(" [stopped]")
    except ServingError as error:
        error_line(error.message)
    say()
