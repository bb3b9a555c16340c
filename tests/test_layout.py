"""The rules of the tree that no type checker knows: who imports whom, and what lies where."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("server", "engine", "kernels")
MODULES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
# What each layer may import of ours: itself and the next one down.
MAY_IMPORT = {
    "server": {"server", "engine"},
    "engine": {"engine", "kernels"},
    "kernels": {"kernels"},
}
MAX_LINES = 400


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_of(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} has a relative import"
            yield node.module or ""


def reads_environment(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            return any(alias.name in ("environ", "getenv") for alias in node.names)
    return False


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    ours = [name.split(".") for name in imports_of(path) if name.split(".")[0] == "bezel"]
    assert {parts[1] for parts in ours} <= MAY_IMPORT[layer]


def test_server_does_not_import_torch() -> None:
    files = {name_of(p) for p in MODULES if "torch" in {n.split(".")[0] for n in imports_of(p)}}
    assert files
    assert not any(name.startswith("server/") for name in files)


def test_http_layer_runs_without_torch() -> None:
    names = sorted({path.stem for path in (ROOT / "server").glob("*.py")})
    assert "app" in names
    code = "import importlib, sys\n"
    code += f"for name in {names}: importlib.import_module(f'bezel.server.{{name}}')\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_one_module_knows_prometheus() -> None:
    files = [name_of(p) for p in MODULES if any("prometheus" in name for name in imports_of(p))]
    assert set(files) == {"engine/metrics.py"}


def test_one_module_reads_the_environment() -> None:
    assert [name_of(path) for path in MODULES if reads_environment(path)] == ["server/cli.py"]


def test_packages_are_the_folders() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {"bezel." + ".".join(path.parent.relative_to(ROOT).parts) for path in MODULES}
    assert set(project["tool"]["setuptools"]["packages"]) == folders


def test_there_is_no_init() -> None:
    for folder in (*LAYERS, "tests"):
        assert list((ROOT / folder).rglob("__init__.py")) == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(text))
