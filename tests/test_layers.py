"""The layers of docs/architecture.md, enforced: imports go downward only, through a package's __init__."""

import ast
from pathlib import Path

import plait

SOURCE = Path(plait.__file__).parent

# Highest first. A package may import from the lines below its own; plait itself (the public names) stands on top.
LAYERS = (
    {"cli"},
    {"settings"},
    {"gateway", "client", "bench"},
    {"simulator"},
    {"worker", "profiler"},
    {"engine", "metrics", "transport"},
    {"kernels"},
    {"placement"},
    {"routing"},
    {"scheduling"},
    {"kvcache"},
    {"session"},
    {"costs"},
    {"wire"},
    {"cluster"},
    {"model", "workload"},
    {"ids", "units"},
    {"errors"},
)
LINE = {package: number for number, layer in enumerate(LAYERS) for package in layer}
FIRST_PURE_LINE = LINE["placement"]
NOT_BELOW_THE_LINE = {
    *("torch", "asyncio", "threading", "socket", "time", "random", "subprocess", "os"),
    *("safetensors", "tokenizers", "httpx", "fastapi", "uvicorn", "starlette", "multiprocessing"),
}


def test_imports_go_downward_only() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)}:{line} imports {module}"
        for path, line, module in _imports()
        if module.split(".")[0] == "plait" and not _downward(path, module)
    ]
    assert not wrong, "\n".join(wrong)


def test_packages_are_imported_through_their_init() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)}:{line} imports {module}"
        for path, line, module in _imports()
        if module.startswith("plait.")
        and module.count(".") > 1
        and module.split(".")[1] != _package(path)
        # The extension may be absent: who uses it imports it itself, where it is needed.
        and not module.startswith("plait.kernels._native")
    ]
    assert not wrong, "\n".join(wrong)


def test_policy_knows_no_clock_no_io_no_torch_and_no_threads() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)}:{line} imports {module}"
        for path, line, module in _imports()
        if LINE.get(_package(path), -1) >= FIRST_PURE_LINE and module.split(".")[0] in NOT_BELOW_THE_LINE
    ]
    assert not wrong, "\n".join(wrong)


def test_every_package_has_a_layer() -> None:
    packages = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert packages <= set(LINE), f"without a layer: {packages - set(LINE)}"


def _package(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _downward(path: Path, module: str) -> bool:
    here, there = _package(path), module.split(".")[1] if "." in module else ""
    if here in {"__init__", "__main__"} or here == there:
        return True
    if there == "":
        return LINE[here] == 0 or here in {"gateway", "bench", "client"}  # `from plait import __version__`
    return LINE[there] > LINE[here]


def _imports() -> list[tuple[Path, int, str]]:
    found: list[tuple[Path, int, str]] = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.extend((path, node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno} is a relative import"
                found.append((path, node.lineno, node.module or ""))
    return found
