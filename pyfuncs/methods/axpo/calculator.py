"""The built-in tool: arithmetic, without ``eval``."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

_LENGTH, _POWER, _SIZE = 200, 100, 1e100
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_UNARY: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculator(expression: str) -> str:
    """Works out an arithmetic expression.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, such as (3 + 4) * 2.

    Returns:
        The value.
    """
    if not isinstance(expression, str) or not expression.strip():
        raise ValueError("expression must be a string such as 3 + 4")
    if len(expression) > _LENGTH:
        raise ValueError(f"the expression is longer than {_LENGTH} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"not an arithmetic expression: {expression!r}") from None
    value = _value(tree)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"
    return str(value)


def _value(node: ast.AST) -> int | float:
    value: Any
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        value = _UNARY[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > _POWER:
            raise ValueError(f"an exponent is larger than {_POWER}")
        try:
            value = _BINARY[type(node.op)](left, right)
        except ZeroDivisionError:
            raise ValueError("division by zero") from None
        except OverflowError:
            raise ValueError("a number is too large") from None
    else:
        raise ValueError("only numbers, + - * / // % ** and parentheses are understood")
    if isinstance(value, complex):
        raise ValueError("a root of a negative number")
    if not abs(value) <= _SIZE:
        raise ValueError("a number is too large")
    return value
