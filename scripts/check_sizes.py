"""Checks the sizes of files and functions of the package: run by ``make lint``.

A file has at most 400 lines, a function at most 80 lines of code (docstring, comments and blank lines not counted), and
at most 30 functions take 8 arguments or more.

Example: python scripts/check_sizes.py
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "subspace_jax"
FILE_LINES, FUNCTION_LINES, ARGUMENTS, LONG_SIGNATURES = 400, 80, 8, 30

Function = ast.FunctionDef | ast.AsyncFunctionDef
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> set[int]:
    """Returns the numbers of the lines that hold code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def docstring_lines(function: Function) -> set[int]:
    """Returns the numbers of the lines of a function's docstring."""
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return set(range(first.lineno, first.end_lineno + 1))
    return set()


def num_arguments(function: Function) -> int:
    """Returns the number of parameters, without ``self`` and ``cls``."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def main() -> None:
    """Prints what is too large, and exits with 1 where anything is."""
    wrong, long_signatures = [], []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text()
        name = path.relative_to(PACKAGE.parent)
        if (count := source.count("\n")) > FILE_LINES:
            wrong.append(f"{name}: {count} lines, expected at most {FILE_LINES}")
        code = code_lines(source)
        for function in ast.walk(ast.parse(source)):
            if not isinstance(function, Function):
                continue
            where = f"{name}:{function.lineno}: {function.name}"
            body = set(range(function.lineno, function.end_lineno + 1)) & code - docstring_lines(function)
            if len(body) > FUNCTION_LINES:
                wrong.append(f"{where} has {len(body)} lines of code, expected at most {FUNCTION_LINES}")
            if num_arguments(function) >= ARGUMENTS:
                long_signatures.append(f"{where} takes {num_arguments(function)}")
    if len(long_signatures) > LONG_SIGNATURES:
        count = len(long_signatures)
        head = f"{count} functions take {ARGUMENTS} arguments or more, expected at most {LONG_SIGNATURES}:"
        wrong.append("\n  ".join([head, *long_signatures]))
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
