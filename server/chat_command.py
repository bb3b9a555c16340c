"""`bezel chat [PROMPT]`: talk to a server, in turns or once."""

import argparse
from collections.abc import Mapping
from typing import Any, TypeVar

from bezel.server.chatting.settings import ChatSettings, ClientSettings
from bezel.server.options import add_flags, options_of
from bezel.server.settings import API_KEY_VARIABLE, URL_VARIABLE

Kind = TypeVar("Kind", bound=ClientSettings)


def add_parser(commands: Any) -> None:
    """Add `chat` to the subparsers `commands`; flags that aren't given leave no trace."""
    parser = commands.add_parser(
        "chat",
        help="talk to a running server",
        description="Talk to a server with OpenAI's API. With PROMPT, or one from a pipe, it is "
        "asked once. Ctrl-C stops an answer, Ctrl-D leaves.",
        epilog=f"{URL_VARIABLE} and {API_KEY_VARIABLE} stand for --url and --api-key.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to ask")
    add_flags(parser, "chat", options_of(ChatSettings))


def client_settings(
    kind: type[Kind], arguments: argparse.Namespace, environ: Mapping[str, str]
) -> Kind:
    """Of this kind, from flags and the two variables that a client knows."""
    given = {o.name: getattr(arguments, o.name) for o in options_of(kind) if o.name in arguments}
    if URL_VARIABLE in environ:
        given.setdefault("url", environ[URL_VARIABLE])
    if API_KEY_VARIABLE in environ:
        # `bezel serve` takes several there.
        given.setdefault("api_key", environ[API_KEY_VARIABLE].split(",")[0].strip())
    return kind(**given)


def run(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Ask once, or turn after turn; returns the exit code, which is 1 if the server isn't there,
    or had no answer to the only question.

    Raises:
        ConfigError: a setting can't be, or there is nothing to ask.
    """
    from bezel.server.chatting.chat import Chat
    from bezel.server.chatting.connection import Connection
    from bezel.server.chatting.conversation import Conversation
    from bezel.server.chatting.terminal import Terminal, type_line

    settings = client_settings(ChatSettings, arguments, environ)
    terminal = Terminal.of(getattr(arguments, "prompt", None), environ)
    conversation = Conversation(settings)
    with Connection(settings) as connection:
        chat = Chat(connection, conversation, terminal.display, type_line)
        if terminal.prompt is not None:
            return chat.answer(terminal.prompt)
        return chat.talk()
