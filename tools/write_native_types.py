"""Write src/plait/kernels/_native.pyi, the types of the C++ extension, from the extension that is installed.

nanobind's generator knows the signatures. Two things are said better here: an array parameter takes tensors too, and
containers of anything say so, as strict type checking wants. Run it after a change of csrc/bind_*.cc:

    .venv/bin/python tools/write_native_types.py [where else]
"""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src/plait/kernels"

HEADER = '''\
"""Written by tools/write_native_types.py. An Array's type and shape are in the C++ that checks them, csrc/bind_*.cc."""

# ruff: noqa: E501

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = NDArray[Any] | Tensor
'''

OF_ANYTHING = {
    "dict": "dict[str, Any]",
    "list": "list[Any]",
    "tuple": "tuple[Any, ...]",
    "Callable": "Callable[..., Any]",
    "NDArray": "NDArray[Any]",
}


class Plain(ast.NodeTransformer):
    """An annotation without nanobind's notes on memory; in a parameter, an array becomes an Array."""

    def __init__(self, parameter: bool) -> None:
        self._parameter = parameter

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id == "Annotated":
            assert isinstance(node.slice, ast.Tuple)
            return self.visit(node.slice.elts[0])
        if isinstance(node.value, ast.Name) and node.value.id == "NDArray":
            return ast.Name("Array") if self._parameter else node
        node.slice = self.visit(node.slice)
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if self._parameter and node.id == "NDArray":
            return ast.Name("Array")
        return ast.parse(OF_ANYTHING.get(node.id, node.id), mode="eval").body


def plain_stub(stub: str) -> str:
    """The generator's output, said better."""
    module = ast.parse(stub)
    module.body = [line for line in module.body if not isinstance(line, ast.Import | ast.ImportFrom)]
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            for argument in (*node.args.args, *node.args.kwonlyargs):
                if argument.annotation:
                    argument.annotation = Plain(parameter=True).visit(argument.annotation)
            if node.returns:
                node.returns = Plain(parameter=False).visit(node.returns)
    return HEADER + "\n" + ast.unparse(module) + "\n"


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE / "_native.pyi"
    python = (sys.executable, "-m")
    subprocess.run(
        [*python, "nanobind.stubgen", "-q", "-m", "plait.kernels._native", "-o", str(target)], check=True
    )
    target.write_text(plain_stub(target.read_text()))
    rules = PACKAGE.parents[2] / "pyproject.toml"
    subprocess.run([*python, "ruff", "format", "--quiet", "--config", str(rules), str(target)], check=True)


if __name__ == "__main__":
    main()
