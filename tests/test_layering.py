"""Which module may import which, and what no module may use; read from the sources with ``ast``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module imports only from levels below its own. A new module must be given its place here.
LEVELS: dict[str, int] = {
    "errors": 0,
    "version": 0,
    "units": 0,
    "text": 0,
    "dtypes": 0,
    "uncompiled": 0,
    "statistics": 1,
    "layout": 1,
    "address": 1,
    "open_files": 1,
    "zmq_context": 2,
    "listener": 2,
    "fences": 1,
    "forks": 1,
    "threads": 1,
    "turns": 1,
    "liveness": 1,
    "opening": 1,
    "bell": 2,
    "alarm": 1,
    "backlog": 1,
    "segment": 2,
    "ring": 2,
    "descriptor": 1,
    "plain": 2,
    "views": 1,
    "receive_arena": 3,
    "send_arena": 3,
    "message": 3,
    "options": 4,
    "protocol": 4,
    "channel": 4,
    "zmq_channel": 5,
    "message_ring": 3,
    "connection": 5,
    "doorbell": 6,
    "handshake": 6,
    "link": 7,
    "hosted": 7,
    "host": 8,
    "client": 8,
    "server": 9,
    "aio": 9,
    "aio_server": 9,
    "leftovers": 3,
    "facts": 4,
    "metrics": 9,
    "measure": 9,
    "__init__": 10,
    "doctor": 11,
    "commands": 12,
    "__main__": 13,
}
PURE = ("protocol", "ring")
IMPURE_PACKAGES = {"zmq", "mmap", "posix_ipc"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    """The dotted name; a package's ``__init__`` keeps that as its last part."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> Iterator[str]:
    """Dotted absolute names of all that a module imports, wherever the import stands; names from packages too."""
    package = module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *(node.module.split(".") if node.module else [])]
            yield ".".join(parts)
            for alias in node.names:
                yield ".".join([*parts, alias.name])


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def siblings(path: Path) -> set[str]:
    """The modules of shmtransport that a module of it imports."""
    known = {source.stem for source in sources("shmtransport")} - {"__init__"}
    parts = [name.split(".") for name in imported(path)]
    return {name[1] for name in parts if name[0] == "shmtransport" and len(name) > 1 and name[1] in known}


def test_shmtransport_never_imports_llama_split() -> None:
    """The transport knows nothing of what is built on it."""
    found = [(str(p), n) for p in sources("shmtransport") for n in imported(p) if is_within(n, "llama_split")]
    assert not found


def test_the_trusted_side_never_imports_the_worker() -> None:
    """Nothing of the worker's code runs where the prompt is."""
    paths = sources("llama_split/trusted")
    assert paths
    found = [(str(p), n) for p in paths for n in imported(p) if is_within(n, "llama_split.worker")]
    assert not found


def test_what_the_trusted_side_imports_does_not_import_the_worker_either() -> None:
    """Not even by way of the modules that both sides share."""
    modules = {module_name(path).removesuffix(".__init__"): path for path in sources("llama_split")}
    reached = {name for name in modules if is_within(name, "llama_split.trusted")}
    frontier = set(reached)
    while frontier:
        name = frontier.pop()
        for target in imported(modules[name]):
            if target in modules and target not in reached and target != "llama_split":
                reached.add(target)
                frontier.add(target)
    assert len(reached) > 3
    assert not [name for name in reached if is_within(name, "llama_split.worker")]


def test_the_worker_never_imports_the_trusted_side() -> None:
    """The worker needs none of the code that sees the prompt."""
    paths = sources("llama_split/worker")
    assert paths
    found = [(str(p), n) for p in paths for n in imported(p) if is_within(n, "llama_split.trusted")]
    assert not found


def test_every_module_of_shmtransport_has_its_level() -> None:
    """An unknown module fails: whoever adds one decides where it stands."""
    assert {path.stem for path in sources("shmtransport")} <= LEVELS.keys()


@pytest.mark.parametrize("path", sources("shmtransport"), ids=lambda path: path.stem)
def test_imports_within_shmtransport_run_downwards(path: Path) -> None:
    """A module imports only modules of lower levels."""
    level = LEVELS[path.stem]
    upward = {name for name in siblings(path) if LEVELS.get(name, 99) >= level}
    assert not upward, f"{path.stem} (level {level}) imports {upward}"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_no_input_or_output(name: str) -> None:
    """Protocol and ring decide; they neither send nor map."""
    roots = {found.split(".")[0] for found in imported(ROOT / "shmtransport" / f"{name}.py")}
    assert not roots & IMPURE_PACKAGES


@pytest.mark.parametrize("path", [*sources("shmtransport"), *sources("llama_split")], ids=module_name)
def test_no_module_can_run_what_a_peer_or_a_file_says(path: Path) -> None:
    """No pickle, no eval, no exec, trust_remote_code only to refuse it; torch.load is pickle too."""
    assert not {name.split(".")[0] for name in imported(path)} & FORBIDDEN_MODULES
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.id if isinstance(called, ast.Name) else None
            assert name not in FORBIDDEN_CALLS, f"line {node.lineno} calls {name}"
            for keyword in node.keywords:
                refused = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                assert keyword.arg != "trust_remote_code" or refused, f"line {node.lineno}"
            assert ast.unparse(called) not in {"torch.load", "builtins.eval", "builtins.exec", "np.load", "numpy.load"}
        elif isinstance(node, ast.Constant):
            assert node.value != "trust_remote_code", f"line {node.lineno}"


def test_the_check_sees_an_upward_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules above would fail on a breach, in each way of writing it."""
    monkeypatch.setattr("tests.test_layering.ROOT", tmp_path)
    package = tmp_path / "shmtransport"
    package.mkdir()
    (package / "client.py").write_text("")
    for text in ("from .client import Client", "from . import client", "import shmtransport.client"):
        (package / "ring.py").write_text(f"def f():\n    {text}\n")
        assert siblings(package / "ring.py") == {"client"}
    (package / "ring.py").write_text("from llama_split.worker import kernels")
    assert "llama_split.worker.kernels" in set(imported(package / "ring.py"))
