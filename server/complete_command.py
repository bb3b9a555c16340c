"""`bezel complete [PROMPT]`: have a server continue texts, without turns and templates."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bezel.server.chat_command import client_settings
from bezel.server.chatting.settings import CompleteSettings
from bezel.server.options import add_flags, options_of
from bezel.server.settings import API_KEY_VARIABLE, URL_VARIABLE

if TYPE_CHECKING:
    from bezel.server.chatting.display import Display

_PATH = "/v1/completions"


def add_parser(commands: Any) -> None:
    """Add `complete` to the subparsers `commands`; flags that aren't given leave no trace."""
    parser = commands.add_parser(
        "complete",
        help="have a running server continue a text",
        description="Have a server with OpenAI's API continue a text. With PROMPT, or one from a "
        "pipe, it does so once; otherwise with each line that is typed.",
        epilog=f"{URL_VARIABLE} and {API_KEY_VARIABLE} stand for --url and --api-key.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text to continue")
    add_flags(parser, "complete", options_of(CompleteSettings))


def run(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Complete one text or several; returns the exit code, which is 1 if the server isn't
    there, or failed at the only one.

    Raises:
        ConfigError: a setting can't be, or there is nothing to complete.
    """
    from bezel.server.chatting.answering import Outcome, follow, greet
    from bezel.server.chatting.connection import Connection
    from bezel.server.chatting.terminal import Terminal, lines_of, type_line

    settings = client_settings(CompleteSettings, arguments, environ)
    terminal = Terminal.of(getattr(arguments, "prompt", None), environ)
    display = terminal.display
    with Connection(settings) as connection:

        def complete(prompt: str) -> Outcome:
            chunks = connection.stream(_PATH, {"prompt": prompt, **settings.sampling})
            outcome = follow(chunks, lambda chunk: _show(chunk, display), display)
            if outcome is Outcome.ANSWERED:
                display.end()
            return outcome

        if terminal.prompt is not None:
            return complete(terminal.prompt)
        if greet(connection) is Outcome.FAILED:
            return Outcome.FAILED
        for line in lines_of("> ", type_line):
            complete(line)
    return 0


def _show(chunk: dict[str, Any], display: "Display") -> None:
    from bezel.server.stream_chunks import choices_of

    for choice in choices_of(chunk):
        display.content(choice.get("text") or "")
