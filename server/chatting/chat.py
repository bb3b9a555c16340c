"""`Chat`: a conversation with a server, turn after turn."""

from collections.abc import Callable
from contextlib import suppress

from bezel.server.chatting.answering import Outcome, follow, greet
from bezel.server.chatting.connection import Connection
from bezel.server.chatting.conversation import Answer, Conversation
from bezel.server.chatting.display import Display
from bezel.server.chatting.terminal import lines_of
from bezel.server.nearest import did_you_mean

_PATH = "/v1/chat/completions"
_COMMANDS = ("/exit", "/help", "/no-think", "/quit", "/reset", "/system", "/think")
_HELP = """\
/system TEXT   set the system's turn; without TEXT: show it
/think         think before answering; /no-think: don't
/reset         forget what was said
/exit          leave, as Ctrl-D does; Ctrl-C stops an answer"""


class Chat:
    """Questions from `read_line`, answers on the display."""

    def __init__(
        self,
        connection: Connection,
        conversation: Conversation,
        display: Display,
        read_line: Callable[[str], str],
    ) -> None:
        self._connection = connection
        self._conversation = conversation
        self._display = display
        self._read_line = read_line

    def answer(self, text: str) -> Outcome:
        """Ask once."""
        self._conversation.ask(text)
        return self._turn(Answer())

    def talk(self) -> Outcome:
        """Until the user leaves; fails if nobody is there to talk to."""
        if greet(self._connection) is Outcome.FAILED:
            return Outcome.FAILED
        for line in lines_of("> ", self._read_line):
            if not line.startswith("/"):
                with suppress(KeyboardInterrupt):  # pressed a moment after the answer's end
                    self._ask(line.strip())
            elif not self._command(*line.strip().partition(" ")[::2]):
                break
        return Outcome.ANSWERED

    def _ask(self, text: str) -> None:
        """A question, and answers to the calls that it leads to."""
        self._conversation.ask(text)
        answer = Answer()
        while self._turn(answer) is Outcome.ANSWERED and answer.calls:
            if not self._answer_calls(answer):
                self._conversation.take_back()
                return
            answer = Answer()

    def _turn(self, answer: Answer) -> Outcome:
        outcome = follow(
            self._connection.stream(_PATH, self._conversation.body()),
            lambda chunk: answer.add(chunk, self._display),
            self._display,
        )
        if outcome is Outcome.FAILED:
            self._conversation.take_back()
            return outcome
        is_cut = answer.finish_reason == "length"
        if is_cut or outcome is Outcome.STOPPED:
            self._conversation.cut(answer)
        else:
            self._conversation.answered(answer)
        if outcome is Outcome.ANSWERED:
            self._display.end("cut off: no tokens left" if is_cut else "")
        if is_cut:
            answer.calls = []
        return outcome

    def _answer_calls(self, answer: Answer) -> bool:
        """Whether the user had an answer to each."""
        for call in answer.calls:
            try:
                result = self._read_line(f"{call['function']['name']} returns: ")
            except (KeyboardInterrupt, EOFError):
                print()
                return False
            self._conversation.returned(call, result)
        return True

    def _command(self, name: str, text: str) -> bool:
        """Whether to go on."""
        conversation = self._conversation
        match name:
            case "/exit" | "/quit":
                return False
            case "/reset":
                conversation.reset()
            case "/think" | "/no-think":
                conversation.think = name == "/think"
            case "/system" if text.strip():
                conversation.system = text.strip()
            case "/system":
                print(conversation.system or "there is none")
            case "/help":
                print(_HELP)
            case _:
                hint = did_you_mean(name, _COMMANDS) or "; /help lists them"
                print(f"unknown command {name}{hint}")
        return True
