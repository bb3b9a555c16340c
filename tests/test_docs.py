"""README, docs and changelog say what the code does: flags, commands, series, versions."""

import argparse
import ast
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from bezel.engine import errors
from bezel.engine.config import EngineConfig
from bezel.server.cli import build_parser
from bezel.server.config import ServerConfig
from bezel.server.options import options_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_of(page: Path) -> Iterator[str]:
    """Lines of code blocks, and code spans in prose."""
    in_block = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            in_block = not in_block
        elif in_block:
            yield line
        else:
            yield from re.findall(r"`([^`]+)`", line)


def all_subclasses(cls: type) -> Iterator[type]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from all_subclasses(subclass)


def test_configuration_page_is_current() -> None:
    script = load_script(ROOT / "docs" / "generate.py")
    written = script.PAGE.read_text(encoding="utf-8")
    assert written == script.render(), "stale: run `make docs`"


def test_configuration_page_has_every_setting() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(--[a-z-]+)` \| `(BEZEL_[A-Z_]+)` \|", page, re.MULTILINE)
    options = [*options_of(ServerConfig), *options_of(EngineConfig)]
    assert rows == [(option.flag, option.variable) for option in options]


@pytest.fixture(scope="module")
def http_api() -> ModuleType:
    return load_script(ROOT / "docs" / "generate_http_api.py")


def test_http_api_page_is_current(http_api: ModuleType) -> None:
    written = http_api.PAGE.read_text(encoding="utf-8")
    assert written == http_api.render(written), "stale: run `make docs`"


def test_http_api_page_has_every_part(http_api: ModuleType) -> None:
    written = http_api.PAGE.read_text(encoding="utf-8")
    parts = [name for _, name, _ in http_api.PART.findall(written)]
    assert sorted(parts) == sorted(http_api.parts())


def test_http_api_page_has_every_error_code(http_api: ModuleType) -> None:
    """Those that exceptions are made with, anywhere in the server."""
    codes = set()
    for path in (ROOT / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "InvalidRequest":
                given = [*node.args[2:], *(k.value for k in node.keywords if k.arg == "code")]
                codes |= {arg.value for arg in given if isinstance(arg, ast.Constant)}
    assert "unsupported_parameter" in codes
    assert codes <= {getattr(error, "code", None) for error, _ in http_api.ERRORS}


def test_http_api_page_has_every_error_a_request_can_raise(http_api: ModuleType) -> None:
    told = {type(error) for error, _ in http_api.ERRORS}
    start_up = {errors.ConfigError, errors.CheckpointError}
    ours = {cls for cls in all_subclasses(errors.BezelError) if cls.__module__.startswith("bezel.")}
    assert ours - start_up <= told


def all_flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Those of a parser and of all its commands."""
    yield from parser._option_string_actions
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                yield from all_flags(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page: Path) -> None:
    known = set(all_flags(build_parser()))
    for code in code_of(page):
        if not code.startswith(("docker ", "make test ")):  # their flags are others'
            assert set(re.findall(r"--[a-z][a-z-]+", code)) <= known, code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for code in code_of(page):
        assert set(re.findall(r"^make ([a-z-]+)", code)) <= targets, code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("layer", ["server", "engine", "kernels"])
def test_architecture_names_every_module(layer: str) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", page))
    assert {path.stem for path in (ROOT / layer).glob("*.py")} <= named


def test_readme_names_the_two_commands_and_the_default_models_terms() -> None:
    assert {"make serve", "make test"} <= {line.split("  ")[0] for line in code_of(PAGES[0])}
    assert "GEMMA_TERMS.html" in PAGES[0].read_text(encoding="utf-8")


def test_changelog_has_this_version_first() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)[0] == project["version"]


def test_size_marks_modules_that_are_too_long(tmp_path: Path) -> None:
    for folder, num_lines in (("engine/layers", 401), ("server", 400), ("tests", 500)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.py").write_text("pass\n" * num_lines)
    report = load_script(ROOT / "benchmarks" / "size.py").report(tmp_path)
    assert "       401  engine/layers/x.py  over 400\n" in report
    assert "       400  server/x.py\n" in report
    assert "   500  tests/  (1 files)\n" in report
    assert report.endswith("   801  in server, engine, kernels")
