"""Prints how many lines of Python each folder and module has: `make size`.

Modules of the server, the engine and the kernels with more than 400 lines are marked; a module
should be readable in one sitting. Counts all lines: comments are read too. Standard library only.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("server", "engine", "kernels")
OTHER_FOLDERS = ("tests", "benchmarks", "docs")
MAX_MODULE_LINES = 400


def count_lines(folder: Path) -> dict[Path, int]:
    """Lines of every Python file under `folder`, the longest first."""
    files = [path for path in folder.rglob("*.py") if "__pycache__" not in path.parts]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    return dict(sorted(lines.items(), key=lambda item: -item[1]))


def report(root: Path) -> str:
    """The table of the tree at `root`, as text."""
    rows = []
    num_source_lines = 0
    for name in (*SOURCE_FOLDERS, *OTHER_FOLDERS):
        lines = count_lines(root / name)
        rows.append(f"{sum(lines.values()):6}  {name}/  ({len(lines)} files)")
        if name in SOURCE_FOLDERS:
            num_source_lines += sum(lines.values())
            rows += [_module_row(root, path, num) for path, num in lines.items()]
    rows.append(f"{num_source_lines:6}  in {', '.join(SOURCE_FOLDERS)}")
    return "\n".join(rows)


def _module_row(root: Path, path: Path, num_lines: int) -> str:
    mark = f"  over {MAX_MODULE_LINES}" if num_lines > MAX_MODULE_LINES else ""
    return f"{num_lines:10}  {path.relative_to(root).as_posix()}{mark}"


if __name__ == "__main__":
    print(report(ROOT))
