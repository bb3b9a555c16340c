"""What SECURITY.md promises of the code as a whole: nothing that is read is ever executed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    p for layer in ("server", "engine", "kernels") for p in (ROOT / layer).rglob("*.py")
)

# Each can run code that stands in what it reads.
EXECUTING_MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),
    *("code", "codeop", "runpy"),
}
EXECUTING_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"),
    *("torch.jit.load", "torch.package.PackageImporter", "numpy.load", "np.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "socket.recv_pyobj"),
}
EXECUTING_ARGUMENTS = {"shell", "trust_remote_code", "allow_pickle"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def findings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (name for name in names if name.split(".")[0] in EXECUTING_MODULES)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            if module.split(".")[0] in EXECUTING_MODULES:
                yield module
            yield from (name for name in names if name in EXECUTING_CALLS)
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in EXECUTING_CALLS:
                yield ast.unparse(node.func)
            for keyword in node.keywords:
                is_off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in EXECUTING_ARGUMENTS and not is_off:
                    yield str(keyword.arg)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "torch.load(path)",
        "eval('1')",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
    ],
)
def test_what_would_be_found(source: str) -> None:
    assert list(findings(source))
    assert not list(findings("model.eval(); re.compile('a'); run(command, shell=False)"))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_executes_what_it_reads(path: Path) -> None:
    assert list(findings(path.read_text(encoding="utf-8"))) == []


def test_security_page_says_how_to_report() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "Report a vulnerability" in page
    assert "make audit" in page
