"""docs/operations.md has every alert, links that lead somewhere, and limits as they are."""

import re
from pathlib import Path

import pytest
import scrape

from bezel.engine.config import EngineConfig
from bezel.server.config import ServerConfig
from bezel.server.options import options_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "operations.md"


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_every_alert_has_a_row(page: str) -> None:
    told = re.findall(r"^\| `(Bezel\w+)` \|", page, re.MULTILINE)
    assert told == [rule["alert"] for rule in scrape.alert_rules()]
    assert set(re.findall(r"`(Bezel[A-Z]\w+)`", page)) == set(told)


def test_anchors_exist(page: str) -> None:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    wanted = set(re.findall(r"\]\(#([^)]+)\)", page))
    assert wanted
    assert wanted <= anchors


def test_limits_are_those_of_the_settings(page: str) -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)` \| (\S+) \|", page, re.MULTILINE)
    defaults = {o.flag: o.default for o in (*options_of(ServerConfig), *options_of(EngineConfig))}
    assert len(rows) > 10
    for flag, told in rows:
        assert told == ("none" if defaults[flag] is None else str(defaults[flag])), flag


def test_series_exist(page: str) -> None:
    exported = scrape.exported_by(scrape.full_metrics().render()[0].decode())
    known = {*exported, *scrape.series_of(exported)}
    assert set(re.findall(r"`(bezel_\w+)`", page)) <= known
