"""Makes docs/images/page*.png: `.venv/bin/python docs/screenshots.py`.

They are what a headless Chromium of the system shows (on Debian: `apt install chromium`). In two of
them what the model says is scripted, so that they are the same each time; server, tokenizer and
page are the real ones. The third is of a real server with the default model. The dashboard is
drawn by `draw_dashboard.py`.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from chromium import BINARY, Tab, browser
from scripted_chat import ScriptedEngine, scripted_state
from served import served
from server_process import running

from bezel.engine.messages import PrefixStats, StepStats
from bezel.server.app import create_app

IMAGES = Path(__file__).with_name("images")
SIZE = (1000, 800)  # CSS pixels
IS_DONE = "document.querySelector('.turn:last-child')?.getAttribute('aria-busy') === 'false'"
QUESTION = "How do I sort rows by year, newest first, and then by name?"
ANSWER = """\
<|channel>thought
Two keys, one of them descending. Numbers can be negated, so a tuple will do; in general two \
stable sorts do it, the minor key first. Show both.<channel|>\
Years are numbers, so one key is enough:

```python
rows.sort(key=lambda row: (-row.year, row.name))
```

What can't be negated is sorted twice. Python's sort is **stable**: the second pass keeps the \
order of the first among equal years.

```python
rows.sort(key=lambda row: row.name)
rows.sort(key=lambda row: row.year, reverse=True)
```

| Way | Passes | For |
|---|---|---|
| one key | 1 | numbers |
| two sorts | 2 | everything |
"""
STEP = StepStats(
    num_running=1,
    num_waiting=0,
    local_pages_used=120,
    global_pages_used=60,
    num_prefill_tokens=0,
    num_decode_tokens=0,
    num_preemptions=0,
    prefix=PrefixStats(local_pages=80),
    step_seconds=0.0,
)


def take_page(tab: Tab) -> None:
    """page.png: an answer, light. page-thinking.png: the thought before it, dark."""
    engine = ScriptedEngine(answers=[ANSWER], pace_s=0.02)
    state = scripted_state(engine)
    with served(create_app(state)) as url:
        tab.look(*SIZE)
        tab.open(url)
        tab.wait_for("!document.querySelector('#send').disabled")
        state.metrics.observe_step(STEP)
        tab.fill("#input", QUESTION)
        tab.press("Enter")
        tab.wait_for(f"{IS_DONE} && document.querySelector('#pages').innerText.startsWith('120')")
        tab.screenshot(IMAGES / "page.png")
        tab.look(*SIZE, scheme="dark")
        tab.evaluate("document.querySelector('.thinking').open = true, scrollTo(0, 0)")
        tab.screenshot(IMAGES / "page-thinking.png")


def take_completion(tab: Tab) -> None:
    """page-complete.png: the default model, a real one, goes on with a text."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as server:
        tab.look(*SIZE)
        tab.open(server.url)
        tab.wait_for("!document.querySelector('#send').disabled")
        tab.fill("#input", "The old lighthouse keeper climbed the stairs, lit the lamp, and")
        tab.press("Enter")
        tab.wait_for(
            "document.querySelectorAll('.text span')[1]?.innerText.length > 600"
            " && document.querySelector('#running').innerText === '1'",
            timeout_s=60,
        )
        tab.screenshot(IMAGES / "page-complete.png")


def main() -> None:
    if BINARY is None:
        sys.exit("There is no Chromium here; on Debian: apt install chromium")
    IMAGES.mkdir(exist_ok=True)
    with browser() as tab:
        take_page(tab)
        take_completion(tab)


if __name__ == "__main__":
    main()
