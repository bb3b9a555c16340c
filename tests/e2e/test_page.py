"""The chat page in a headless Chromium: the real app, with an engine that follows a script."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from chromium import BINARY, Tab, browser
from scripted_chat import ScriptedEngine, scripted_app, scripted_state, serve_script
from served import served
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bezel.engine.errors import Overloaded
from bezel.engine.messages import PrefixStats, StepStats
from bezel.engine.metrics import Metrics
from bezel.server.app import create_app
from bezel.server.config import ServerConfig
from bezel.server.errors import GenerationFailed
from bezel.server.state import ServerState

pytestmark = pytest.mark.skipif(
    BINARY is None, reason="no Chromium here; on Debian: apt install chromium"
)

DONE = "document.querySelector('.turn:last-child')?.getAttribute('aria-busy') === 'false'"
ANSWER = ".turn:last-child .content"


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as tab:
        yield tab


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def visit(tab: Tab) -> Iterator[Callable[[Any], str]]:
    """Serve an app and open its page; each has an origin of its own, and so remembers nothing."""
    tab.problems.clear()
    with ExitStack() as stack:

        def open_page(app: Any) -> str:
            url = stack.enter_context(served(app))
            tab.open(url)
            return url

        yield open_page
        tab.send("Page.navigate", url="about:blank")


@pytest.fixture
def page(tab: Tab, visit: Any, engine: ScriptedEngine) -> Tab:
    """The page of a server that is ready."""
    visit(scripted_app(engine))
    tab.wait_for("!document.querySelector('#send').disabled")
    return tab


def say(tab: Tab, text: str) -> None:
    tab.fill("#input", text)
    tab.press("Enter")


def ask(tab: Tab, text: str) -> str:
    """Say something and read the whole answer."""
    number = tab.evaluate("document.querySelectorAll('.turn').length")
    say(tab, text)
    tab.wait_for(f"document.querySelectorAll('.turn').length === {number + 1} && {DONE}")
    return tab.text(ANSWER)


def test_an_answer_comes_as_it_is_said(page: Tab, engine: ScriptedEngine) -> None:
    thought_on, go_on = threading.Event(), threading.Event()
    engine.answers = [
        ["<|channel>thought\nFew words ", thought_on, "will do.<channel|>Good ", go_on, "morning!"]
    ]
    page.evaluate("document.querySelector('#reasoning_effort').value = 'low'")
    say(page, "Hello")
    thinking = "document.querySelector('.thinking')"
    page.wait_for(f"{thinking}.open && {thinking}.innerText.includes('Few words')")
    assert page.text("summary") == "Thinking …"
    thought_on.set()
    page.wait_for("document.querySelector('.content').innerText === 'Good'")
    assert page.evaluate("document.querySelector('.turn').getAttribute('aria-busy')") == "true"
    go_on.set()
    page.wait_for(DONE)
    assert page.text(ANSWER) == "Good morning!"
    assert re.fullmatch(r"Thought for \d+\.\d s", page.text("summary"))
    assert not page.evaluate(f"{thinking}.open")
    page.click("summary")
    assert "Few words will do." in page.text(".thinking")
    told = page.text(".facts > span:first-child")
    assert re.match(r"\d+\.\d\d s to the first token · \d+(\.\d)? tokens/s", told), told
    # The last token ends the turn and is part of the usage, as in OpenAI's.
    assert f" · {engine.num_tokens} tokens · prompt " in told
    assert page.problems == []


def test_a_conversation_is_sent_whole(page: Tab, engine: ScriptedEngine) -> None:
    engine.answers = ["<|channel>thought\nA secret.<channel|>Seven.", "Eight.", "Nine."]
    page.evaluate("document.querySelector('#system').value = 'Count.'")
    assert ask(page, "Six?") == "Seven."
    assert ask(page, "And <then>?\nTell.") == "Eight."
    turns = re.findall(r"<\|turn>(\w+)\n(.*?)<turn\|>", engine.prompts[-1], re.DOTALL)
    said = ["Count.", "Six?", "Seven.", "And <then>?\nTell."]
    roles = ["system", "user", "model", "user"]
    assert [(role, text.strip()) for role, text in turns] == list(zip(roles, said, strict=True))
    page.click(".turn:last-child .again")
    page.wait_for(f"{DONE} && document.querySelector('{ANSWER}').innerText === 'Nine.'")
    assert engine.prompts[-1] == engine.prompts[-2]
    page.click("#new")
    engine.answers = ["One."]
    assert ask(page, "Anew") == "One."
    assert "Six?" not in engine.prompts[-1]


HOSTILE = '<img src="x" onerror="window.owned = 1"><script>window.owned = 1</script>'


def test_nothing_that_is_said_becomes_markup(tab: Tab, visit: Any, engine: ScriptedEngine) -> None:
    name = f"gemma{HOSTILE}"
    visit(scripted_app(engine, served_model_name=(name,)))
    tab.wait_for("!document.querySelector('#send').disabled")
    assert name in tab.text("#welcome")
    link = "[a](javascript:window.owned=1) [b](https://example.com/)"
    forms = [HOSTILE, f"**{HOSTILE}**", f"`{HOSTILE}`", f"- {HOSTILE}", f"> {HOSTILE}", link]
    forms += [f"```{HOSTILE}\n{HOSTILE}\n```", f"| {HOSTILE} |\n|---|\n| {HOSTILE} |"]
    text = "\n\n".join(forms)
    engine.answers = [f"<|channel>thought\n{text}<channel|>{text}"]
    ask(tab, HOSTILE)
    seen = tab.evaluate("document.querySelector('.turn').textContent")
    assert seen.count(HOSTILE) == 1 + 2 * 9
    assert tab.evaluate("document.querySelectorAll('main :is(img, script, iframe)').length") == 0
    assert (
        tab.evaluate("[...document.querySelectorAll('main a')].map((a) => a.href)")
        == ["https://example.com/"] * 2
    )
    assert tab.evaluate("typeof window.owned") == "undefined"
    assert tab.problems == []


def test_the_policy_would_stop_markup(page: Tab) -> None:
    """Should the page ever make some: the browser refuses."""
    refusal = "try { document.body.innerHTML = '<b>x</b>'; 'done' } catch (e) { e.name }"
    assert page.evaluate(refusal) == "TypeError"
    for make, directive in (
        ("new Image().src = 'http://127.0.0.1:1/x.png'", "img-src"),
        ("fetch('http://127.0.0.1:1/').catch(() => {})", "connect-src"),
        ("document.body.append(document.createElement('style'))", "style-src-elem"),
    ):
        violated = page.evaluate(
            "new Promise((tell) => { document.addEventListener('securitypolicyviolation',"
            f" (e) => tell(e.effectiveDirective), {{ once: true }}); {make}; }})"
        )
        assert violated == directive


def test_markdown(page: Tab, engine: ScriptedEngine) -> None:
    engine.answers = [
        "## A **title**\nSome *soft* words, snake_case_names and 2 * 3 * 4.\n"
        "1. one\n2. two\n   - inner `code`\n3. three\n\n"
        "| a | b |\n|---|:-:|\n| 1 | **2** |\n\n"
        "```python\ndef f():\n    return '# no title'\n```\nlast"
    ]
    ask(page, "Show")
    shape = page.evaluate(
        "(function shape(e) { return [...e.children].map((c) =>"
        " c.tagName.toLowerCase() + (c.children.length ? `(${shape(c)})` : '')).join(' ') })"
        f"(document.querySelector('{ANSWER}'))"
    )
    assert shape == (
        "h4(strong) p(em) div(ol(li li(ul(li(code))) li))"
        " div(table(tr(th th) tr(td td(strong)))) div(header(span button) pre(code)) p"
    )
    assert page.text("pre") == "def f():\n    return '# no title'"
    assert page.text(".code header span") == "python"
    assert "snake_case_names and 2 * 3 * 4." in page.text(f"{ANSWER} > p:nth-of-type(1)")


def test_a_key_is_asked_for_and_kept(tab: Tab, visit: Any, engine: ScriptedEngine) -> None:
    url = visit(scripted_app(engine, api_key=("schlüssel-✓",)))
    tab.wait_for("!document.querySelector('#key-form').hidden")
    assert "This server wants an API key" in tab.text("#key-reason")
    assert tab.evaluate("document.querySelector('#engine').hidden")
    for key, is_right in (("wrong", False), ("schlüssel-✓", True)):
        tab.fill("#key", key)
        tab.press("Enter")
        if not is_right:
            tab.wait_for("document.querySelector('#key-reason').innerText.includes('refused')")
    tab.wait_for("!document.querySelector('#send').disabled")
    assert tab.evaluate("document.querySelector('#key-form').hidden")
    engine.answers = ["Come in."]
    assert ask(tab, "Knock") == "Come in."
    tab.open(url)
    tab.wait_for("!document.querySelector('#engine').hidden")
    assert tab.evaluate("document.querySelector('#key-form').hidden")


@pytest.mark.parametrize("way", ["Escape", "#stop"])
def test_stop_ends_the_answer_and_what_computes_it(
    page: Tab, engine: ScriptedEngine, way: str
) -> None:
    engine.pace_s = 0.01
    engine.answers = [["On and on. ", *["And on. "] * 10_000], "Fine."]
    say(page, "Talk")
    page.wait_for("document.querySelector('.content').innerText.includes('And on.')")
    if way == "Escape":
        page.press(way)
    else:
        page.click(way)
    page.wait_for(DONE)
    assert page.text(".problem") == "Stopped."
    deadline = time.monotonic() + 10
    while engine.num_aborted == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ask(page, "Go on") == "Fine."
    assert "On and on. And on." in engine.prompts[-1]


def test_a_full_queue_is_waited_for(page: Tab, engine: ScriptedEngine) -> None:
    engine.answers = [Overloaded("The queue is full.", 2), "At last."]
    say(page, "Now")
    page.wait_for("document.querySelector('.problem').innerText.includes('Trying again in')")
    assert page.text(".problem").startswith("The queue is full.")
    page.wait_for(DONE)
    assert page.text(ANSWER) == "At last."
    assert page.evaluate("document.querySelector('.problem').hidden")


def test_a_model_that_loads_is_waited_for(tab: Tab, visit: Any, engine: ScriptedEngine) -> None:
    state = ServerState(ServerConfig(), Metrics())
    visit(create_app(state))
    tab.wait_for("document.querySelector('#status').innerText === 'The model is still loading.'")
    serve_script(state, engine)
    tab.wait_for("!document.querySelector('#send').disabled")
    assert tab.evaluate("document.querySelector('#status').hidden")
    engine.is_ready = False
    engine.answers = ["Back."]
    say(tab, "There?")
    tab.wait_for("document.querySelector('.problem').innerText.includes('is being restarted')")
    engine.is_ready = True
    tab.wait_for(DONE)
    assert tab.text(ANSWER) == "Back."


def test_an_error_amid_the_answer_keeps_what_came(page: Tab, engine: ScriptedEngine) -> None:
    engine.answers = [["So far ", GenerationFailed("The engine gave up.")], "Better."]
    assert ask(page, "Try") == "So far"
    assert page.text(".problem") == "The engine gave up."
    page.click(".turn:last-child .again")
    page.wait_for(f"{DONE} && document.querySelector('{ANSWER}').innerText === 'Better.'")


def test_the_servers_errors_are_shown_as_they_are(page: Tab, engine: ScriptedEngine) -> None:
    page.evaluate("document.querySelector('#temperature').value = '3'")
    ask(page, "Hot")
    assert "temperature must be" in page.text(".problem")
    page.evaluate("document.querySelector('#temperature').value = '0.25'")
    page.evaluate("document.querySelector('#max_tokens').value = '9'")
    engine.answers = ["Mild."]
    assert ask(page, "Mild") == "Mild."
    assert (engine.params[-1].temperature, engine.params[-1].max_tokens) == (0.25, 9)
    # A question without an answer isn't part of the conversation.
    assert "Hot" not in engine.prompts[-1]


def test_a_base_model_completes(tab: Tab, visit: Any, engine: ScriptedEngine) -> None:
    visit(create_app(scripted_state(engine, model="gemma-3-270m")))
    tab.wait_for("!document.querySelector('#send').disabled")
    assert tab.evaluate("document.querySelector('[value=complete]').checked")
    engine.answers = [" upon a time"]
    assert ask_completion(tab, "Once") == "Once upon a time"
    assert engine.prompts == ["<bos>Once"]
    assert engine.params[0].max_tokens == 256


def ask_completion(tab: Tab, text: str) -> str:
    say(tab, text)
    tab.wait_for(DONE)
    return tab.text(".turn:last-child .text")


def test_a_tool_is_called_and_answered(page: Tab, engine: ScriptedEngine) -> None:
    tool = '[{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]'
    page.evaluate(f"document.querySelector('#tools').value = {tool!r}")
    call = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|><|tool_response>'
    engine.answers = [call, "It rains."]
    ask(page, "Weather?")
    assert "get_weather" in page.text(".call")
    assert '"city": "Paris"' in page.text(".call pre")
    page.fill(".results textarea", "wet")
    page.click(".results button")
    page.wait_for(f"document.querySelectorAll('.turn').length === 2 && {DONE}")
    assert page.text(ANSWER) == "It rains."
    assert re.search(r"response:get_weather\{.*wet.*\}", engine.prompts[-1])


def test_the_engine_is_shown(tab: Tab, visit: Any, engine: ScriptedEngine) -> None:
    state = scripted_state(engine)
    visit(create_app(state))
    tab.wait_for("document.querySelector('#running').innerText === '0'")
    step = StepStats(
        num_running=3,
        num_waiting=2,
        local_pages_used=250,
        global_pages_used=50,
        num_prefill_tokens=0,
        num_decode_tokens=0,
        num_preemptions=0,
        prefix=PrefixStats(local_pages=100),
        step_seconds=0.0,
    )
    state.metrics.observe_step(step)
    tab.wait_for("document.querySelector('#running').innerText === '3'")
    assert tab.text("#waiting") == "2"
    assert tab.text("#pages") == "250 local, 50 global"
    widths = "[...document.querySelectorAll('.bar i')].map((part) => part.style.width)"
    assert tab.evaluate(widths) == ["25%", "10%", "10%"]


class Shredder:
    """Sends streams a byte at a time, with lines that end as Windows' do, comments in between."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def shred(message: Message) -> None:
            if message["type"] != "http.response.body" or not message.get("more_body"):
                await send(message)
                return
            shredded = b": a comment\r\n\r\n" + message["body"].replace(b"\n", b"\r\n")
            for byte in shredded:
                await send(message | {"body": bytes([byte])})

        is_stream = scope.get("path") == "/v1/chat/completions"
        await self._app(scope, receive, shred if is_stream else send)


def test_streams_may_be_cut_anywhere(tab: Tab, visit: Any, engine: ScriptedEngine) -> None:
    visit(Shredder(scripted_app(engine)))
    tab.wait_for("!document.querySelector('#send').disabled")
    text = "Größe → 日本語, naïve 😀 and\nlines"
    engine.answers = [text]
    assert ask(tab, "Cut") == text
    assert tab.problems == []
