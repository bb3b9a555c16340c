"""Writes the generated tables of docs/metrics.md: `make docs`.

The page is written by hand but for what stands between `<!-- generated: … -->` and `<!-- end -->`,
which comes from the table that the server's series are made of, and from the alert rules. A test
fails while the page is older.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from bezel.engine import metric_families
from bezel.engine.metric_families import FAMILIES, Family

PAGE = Path(__file__).with_name("metrics.md")
ALERTS = PAGE.parent.parent / "docker" / "alerts.yml"
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(page: str) -> str:
    """The page with its generated parts made anew.

    Raises:
        KeyError: the page wants a part that there isn't.
    """
    made = parts()
    return PART.sub(lambda found: f"{found[1]}\n{made[found[2]]}\n{found[3]}", page)


def parts() -> dict[str, str]:
    """The generated parts of the page, by their names."""
    groups = ("server", "traffic", "latency", "sizes", "engine", "kv_cache")
    made = {group: _table(getattr(metric_families, group.upper())) for group in groups}
    rows = {"labels": _label_rows(), "alerts": _alert_rows()}
    return made | {name: "\n".join(lines) + "\n" for name, lines in rows.items()}


def _table(families: Iterable[Family]) -> str:
    rows = ["| Series | Type | Labels | vLLM | Meaning |", "| --- | --- | --- | --- | --- |"]
    for family in families:
        labels = ", ".join(f"`{label}`" for label in family.labels)
        vllm = ", ".join(f"`{name}`" for name in family.vllm)
        rows.append(
            f"| `{family.exposed_name}` | {family.kind} | {labels} | {vllm} | {family.help} |"
        )
    return "\n".join(rows) + "\n"


def _label_rows() -> Iterator[str]:
    yield from ("| Series | Label | Values |", "| --- | --- | --- |")
    for family in FAMILIES:
        for label, values in family.labels.items():
            if values:
                listed = ", ".join(f"`{value}`" for value in values)
                yield f"| `{family.exposed_name}` | `{label}` | {listed} |"


def _alert_rows() -> Iterator[str]:
    yield from ("| Alert | Severity | For | When |", "| --- | --- | --- | --- |")
    for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            when = rule["expr"].replace("|", "\\|")
            lasting = rule.get("for", "").replace("m", " min")
            severity = rule["labels"]["severity"]
            yield f"| `{rule['alert']}` | {severity} | {lasting} | `{when}` |"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
