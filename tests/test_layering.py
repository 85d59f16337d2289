"""Which module may import which, and what no module may use; read from the sources with ``ast``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The wings of each package, from the ground up: a wing imports only wings that stand before it. Modules beside the
# wings are either the ground that all stand on or the face above them; within one wing, modules form no circle.
WINGS: dict[str, tuple[str, ...]] = {
    "shmtransport": ("core", "memory", "cuda", "protocol", "channels", "endpoints", "diagnostics"),
    "llama_split": (
        "boundary",
        "model",
        "checkpoint",
        "shields",
        "trusted",
        "worker",
        "serving",
        "placement",
        "commands",
    ),
    "bench": ("harness", "contenders", "baseline", "engine", "device", "reports", "commands"),
}
GROUND = {
    "shmtransport": {"channel_kinds", "errors", "units", "text", "statistics", "version"},
    "llama_split": {"errors"},
    "bench": set(),
}
FACE = {"__init__", "__main__"}
NOT_IMPORTED = {
    "shmtransport.core": {"torch", "numpy", "zmq", "mmap", "posix_ipc", "socket", "select", "fcntl", "pathlib"},
    "shmtransport.protocol": {"zmq", "mmap", "posix_ipc", "socket", "select", "fcntl", "pathlib"},
}
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


def wing_of(name: str) -> str | None:
    """The wing that a dotted name is in; None for what stands beside the wings."""
    package, _, rest = name.partition(".")
    first = rest.split(".")[0]
    return first if (ROOT / package / first).is_dir() else None


def height(name: str) -> int:
    """Where a module stands: the ground is 0, then the wings in their order, and the face is above all."""
    package, _, rest = name.partition(".")
    first = rest.split(".")[0]
    if first in WINGS[package]:
        return 1 + WINGS[package].index(first)
    return 0 if first in GROUND[package] else 99


def modules(package: str) -> dict[str, Path]:
    """All modules of a package, by dotted name."""
    return {module_name(path): path for path in sources(package)}


def imports_between(package: str) -> dict[str, set[str]]:
    """Each module of a package, and the modules of it that it imports; an import of a wing is one of its face."""
    known = modules(package)
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = {target for full in imported(path) for target in (full, full + ".__init__") if target in known}
        found[name] = targets - {name, f"{package}.__init__"}
    return found


def circle_in(graph: dict[str, set[str]]) -> set[str]:
    """The modules that lie on a circle of imports, or lead to one."""
    left = {name: set(targets) for name, targets in graph.items()}
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in free}
    return set(left)


def test_shmtransport_never_imports_llama_split() -> None:
    """The transport knows nothing of what is built on it: it neither imports nor mentions it."""
    found = [(str(p), n) for p in sources("shmtransport") for n in imported(p) if is_within(n, "llama_split")]
    assert not found
    assert not [path for path in sources("shmtransport") if "llama" in path.read_text(encoding="utf-8").lower()]


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


@pytest.mark.parametrize("package", WINGS)
def test_every_module_stands_in_a_wing(package: str) -> None:
    """Beside the wings there are only the ground that all stand on and the package's face."""
    beside = {path.stem for path in (ROOT / package).glob("*.py")}
    assert beside <= GROUND[package] | FACE
    assert {path.parent.name for path in (ROOT / package).glob("*/__init__.py")} <= set(WINGS[package])


@pytest.mark.parametrize("package", WINGS)
def test_imports_run_downwards(package: str) -> None:
    """A module imports from its own wing, from wings below it, and from the ground."""
    upward = {
        (name, target)
        for name, targets in imports_between(package).items()
        for target in targets
        if height(target) > height(name) or (height(target) == height(name) and wing_of(target) != wing_of(name))
    }
    assert not upward


@pytest.mark.parametrize("package", WINGS)
def test_no_imports_run_in_a_circle(package: str) -> None:
    """A reader can read a module's imports before the module itself."""
    graph = {name: targets for name, targets in imports_between(package).items() if not name.endswith("__init__")}
    assert not circle_in(graph)


@pytest.mark.parametrize("wing", NOT_IMPORTED)
def test_pure_wings_import_no_input_or_output(wing: str) -> None:
    """The core computes with integers and bytes, the protocol decides what bytes mean; neither sends or maps."""
    paths = sources(wing.replace(".", "/"))
    assert paths
    assert not [(path, name) for path in paths for name in imported(path) if name.split(".")[0] in NOT_IMPORTED[wing]]


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


def test_the_checks_see_a_breach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules above would fail on a breach, in each way of writing it."""
    monkeypatch.setattr("tests.test_layering.ROOT", tmp_path)
    for wing in ("core", "endpoints"):
        (tmp_path / "shmtransport" / wing).mkdir(parents=True)
    (tmp_path / "shmtransport/endpoints/client.py").write_text("from ..core import ring")
    ring = tmp_path / "shmtransport/core/ring.py"
    for text in (
        "from ..endpoints.client import Client",
        "from ..endpoints import client",
        "import shmtransport.endpoints.client",
    ):
        ring.write_text(f"def f():\n    {text}\n")
        with pytest.raises(AssertionError):
            test_imports_run_downwards("shmtransport")
        with pytest.raises(AssertionError):
            test_no_imports_run_in_a_circle("shmtransport")
    ring.write_text("from llama_split.worker import weights\nimport torch")
    assert "llama_split.worker.weights" in set(imported(ring))
    with pytest.raises(AssertionError):
        test_pure_wings_import_no_input_or_output("shmtransport.core")
    (tmp_path / "shmtransport/loose.py").write_text("")
    with pytest.raises(AssertionError):
        test_every_module_stands_in_a_wing("shmtransport")
