"""Leave pictures out by their size, their captions, or what is known of them.

`ingest` and `encode` share these arguments. A picture that a filter leaves out is no reject: the command's last
lines count such pictures by reason.
"""

from __future__ import annotations

import argparse
import ast
import functools
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from finetune import UserError, first_line
from finetune.terminal import positive

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "float": float,
    "int": int,
    "len": len,
    "lower": lambda text: str(text).lower(),
    "max": max,
    "min": min,
    "round": round,
    "str": str,
    "words": lambda text: len(str(text).split()),
}
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.Lt: operator.lt,
    ast.GtE: operator.ge,
    ast.LtE: operator.le,
    ast.In: lambda item, container: item in container,
    ast.NotIn: lambda item, container: item not in container,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Not: operator.not_,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Sub: operator.sub,
    ast.Div: operator.truediv,
}
_NODES: tuple[type[ast.AST], ...] = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.BinOp, ast.Compare, ast.IfExp),
    *(ast.Constant, ast.Name, ast.Load, ast.Call, ast.Subscript, ast.Slice, ast.List, ast.Tuple),
    *(ast.Add, ast.Mult, ast.FloorDiv, ast.Mod),
    *_OPERATORS.keys(),
)
_MAX_EXPRESSION = 2000  # characters: far below what exhausts the parser's stack


def add_filter_arguments(parser: argparse.ArgumentParser) -> None:
    """--where, and limits on size, aspect and captions."""
    group = parser.add_argument_group(
        "filters", "Pictures to leave out. Sizes are those of the upright picture, as it is in the source."
    )
    group.add_argument("--min-size", type=positive, metavar="N", help="short side of at least N pixels")
    group.add_argument("--max-size", type=positive, metavar="N", help="long side of at most N pixels")
    group.add_argument("--max-aspect", type=_aspect, metavar="X", help="long side at most X times the short one")
    group.add_argument(
        "--min-caption-words", type=positive, metavar="N", help="at least one caption has N words or more ..."
    )
    group.add_argument("--max-caption-words", type=positive, metavar="N", help="... and N words at most")
    group.add_argument("--require-caption", action="store_true", help="leave out pictures without a caption")
    group.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="EXPR",
        help="keep what EXPR is true of: fields of the record, width, height, aspect (width / height), caption, "
        f"captions; and, or, not, in, comparisons, arithmetic, {', '.join(sorted(_FUNCTIONS))}, "
        """field("any name"). May be repeated. Example: 'aesthetic > 5 and "watermark" not in lower(caption)'""",
    )


@dataclass(frozen=True)
class Filters:
    """What to leave out; none of it by default.

    A picture passes the word limits if at least one of its captions is within both. Words are what white space
    separates: for languages without it use `--where 'len(caption) >= N'`.
    """

    min_size: int | None = None
    max_size: int | None = None
    max_aspect: float | None = None
    min_caption_words: int | None = None
    max_caption_words: int | None = None
    require_caption: bool = False
    where: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError: limits that nothing can meet, or an expression that can't be understood."""
        for name, low, high in (
            ("size", self.min_size, self.max_size),
            ("caption-words", self.min_caption_words, self.max_caption_words),
        ):
            if low is not None and high is not None and low > high:
                raise UserError(f"--min-{name} {low} is more than --max-{name} {high}; no picture can pass")
        for expression in self.where:
            _evaluator(expression)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Filters:
        """The filters of a command whose parser has `add_filter_arguments`."""
        return cls(
            args.min_size,
            args.max_size,
            args.max_aspect,
            args.min_caption_words,
            args.max_caption_words,
            args.require_caption,
            tuple(args.where),
        )

    def __bool__(self) -> bool:
        return bool(self.describe())

    def describe(self) -> dict[str, Any]:
        """The filters that are set, for JSON; equal descriptions leave out the same pictures."""
        return {
            name: list(v) if name == "where" else v
            for name, v in asdict(self).items()
            if v not in (None, False, ())
        }

    def reason(self, record: Mapping[str, Any], height: int, width: int) -> str | None:
        """Why the picture is left out, in few words that are the same for many pictures; None if it is kept.

        Args:
            record: the sample's, with `captions` (a list of str) and any other fields.
            height, width: of the upright picture, in pixels.
        """
        short, long = min(height, width), max(height, width)
        if self.min_size is not None and short < self.min_size:
            return f"smaller than {self.min_size} px"
        if self.max_size is not None and long > self.max_size:
            return f"larger than {self.max_size} px"
        if self.max_aspect is not None and long > self.max_aspect * short:
            return f"longer than {self.max_aspect:g}:1"
        captions = record.get("captions") or []
        if self.require_caption and not captions:
            return "no caption"
        least, most = self.min_caption_words, self.max_caption_words
        if least is not None or most is not None:
            counts = [len(caption.split()) for caption in captions]
            if not any((least or 0) <= n and (most is None or n <= most) for n in counts):
                limits = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
                return f"no caption of {' and '.join(limits)} words"
        for expression in self.where:
            if (problem := _judge(expression, record, height, width)) is not None:
                return problem
        return None


@dataclass(frozen=True)
class Filtered:
    """A picture that a filter leaves out, and why."""

    reason: str


def _judge(expression: str, record: Mapping[str, Any], height: int, width: int) -> str | None:
    from simpleeval import NameNotDefined

    evaluator, tree = _evaluator(expression)
    captions = record.get("captions") or []
    names = {
        **record,
        "width": width,
        "height": height,
        "aspect": width / height,
        "captions": captions,
        "caption": captions[0] if captions else "",
    }

    def field(name: str) -> Any:
        if name not in names:
            raise NameNotDefined(name, expression)
        return names[name]

    evaluator.names = names
    evaluator.functions["field"] = field
    try:
        kept = evaluator.eval(expression, previously_parsed=tree)
    except NameNotDefined as error:
        return f"no field {error.name}"
    except Exception as error:  # values of any type meet operators that aren't made for them
        # Without the value that it names: reasons are counted, and each picture would have one of its own.
        what = "no such key" if isinstance(error, KeyError) else first_line(error).partition(": ")[0]
        return f"--where {expression} can't be judged: {what}"
    return None if kept else f"not --where {expression}"


@functools.cache
def _evaluator(expression: str) -> tuple[Any, ast.expr]:
    """An evaluator and the parsed expression.

    Raises:
        UserError: it is no expression, or has parts that aren't allowed; says where.
    """
    if len(expression) > _MAX_EXPRESSION:
        raise UserError(f"--where of {len(expression)} characters; at most {_MAX_EXPRESSION} can be read")
    text = expression.strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd escapes in strings
            tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        at, what = "", str(error)
        if isinstance(error, SyntaxError):
            at, what = f" at character {error.offset or len(text)}", error.msg
        hint = "; write and, or, not, ==" if re.search(r"&|\||!(?!=)|(?<![=<>!])=(?!=)", text) else ""
        raise UserError(f"--where {expression}: {what}{at}{hint}") from None
    for node in ast.walk(tree):
        if (problem := _refused(node)) is not None:
            at = f" at character {node.col_offset + 1}" if isinstance(node, ast.expr) else ""
            raise UserError(f"--where {expression}: {problem}{at}; see --help for what can be used")
    from simpleeval import EvalWithCompoundTypes, safe_add, safe_mult

    operators = {
        **_OPERATORS,
        ast.Add: safe_add,
        ast.Mult: safe_mult,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: _modulo,
    }
    evaluator = EvalWithCompoundTypes(operators=operators, functions={}, names={}, allowed_attrs={})
    evaluator.functions = dict(_FUNCTIONS)
    return evaluator, tree.body


def _refused(node: ast.AST) -> str | None:
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id not in (*_FUNCTIONS, "field"):
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            hint = f" (write {method}(...))" if method in _FUNCTIONS else ""
            return f"no function {ast.unparse(node.func)}{hint}"
        if node.keywords:
            return "named arguments can't be used"
    if isinstance(node, ast.Constant) and not isinstance(node.value, str | int | float | None):
        return f"{ast.unparse(node)} can't be used"
    if not isinstance(node, _NODES):
        return f"{ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__} can't be used"
    return None


def _modulo(left: float, right: float) -> float:
    if isinstance(left, str):  # would format, to any length
        raise TypeError("% is for numbers")
    return left % right


def _aspect(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return value
