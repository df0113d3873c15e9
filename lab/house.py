"""The house rules that no linter knows: no Python file over 500 lines, no function over 60. `python -m lab.house`."""

from __future__ import annotations

import ast
import sys
from typing import TYPE_CHECKING

from lab.paths import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILE_LINES, FUNCTION_LINES = 500, 60


def breaches(path: Path) -> Iterator[str]:
    """What in one file is too long, as "path:line: ..."."""
    text = path.read_text()
    lines = text.count("\n")
    if lines > FILE_LINES:
        yield f"{path}:1: {lines} lines; a file beyond {FILE_LINES} is two"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines; a function beyond {FUNCTION_LINES} is two"


def main() -> int:
    """Check src, tests and lab; the number of breaches as exit status, at most 1."""
    found = [
        breach
        for directory in ("src", "tests", "lab")
        for path in sorted((CHECKOUT / directory).rglob("*.py"))
        for breach in breaches(path)
    ]
    print("\n".join(found) if found else "house: every file and function is within its length")
    return min(len(found), 1)


if __name__ == "__main__":
    sys.exit(main())
