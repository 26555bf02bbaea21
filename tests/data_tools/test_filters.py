"""Filters: what each leaves out, in which words, and what an expression may not do."""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.filters import Filters, add_filter_arguments
from finetune import UserError

RECORD = {
    "captions": ["a red cat", "a cat that sits on a mat"],
    "aesthetic": 6.5,
    "tags": ["cat", "mat"],
    "license": "CC0",
    "not a name": 3,
    "nothing": None,
}


def parsed(*args: str) -> Filters:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_filter_arguments(parser)
    return Filters.from_args(parser.parse_args(list(args)))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ((), None),
        (("--min-size", "300"), None),
        (("--min-size", "301"), "smaller than 301 px"),
        (("--max-size", "600"), None),
        (("--max-size", "599"), "larger than 599 px"),
        (("--max-aspect", "2"), None),
        (("--max-aspect", "1.99"), "longer than 1.99:1"),
        (("--min-caption-words", "7"), None),
        (("--min-caption-words", "8"), "no caption of at least 8 words"),
        (("--max-caption-words", "3"), None),
        (("--max-caption-words", "2"), "no caption of at most 2 words"),
        (("--min-caption-words", "4", "--max-caption-words", "6"), "no caption of at least 4 and at most 6 words"),
        (("--require-caption",), None),
    ],
)
def test_sizes_and_captions(args: tuple[str, ...], reason: str | None) -> None:
    assert parsed(*args).reason(RECORD, 300, 600) == reason
    assert parsed(*args).reason(RECORD, 600, 300) == reason
    assert bool(parsed(*args)) == bool(args)


def test_no_captions() -> None:
    for record in ({}, {"captions": []}):
        assert parsed("--require-caption").reason(record, 9, 9) == "no caption"
        assert parsed("--max-caption-words", "5").reason(record, 9, 9) == "no caption of at most 5 words"
        assert parsed("--where", "caption == '' and len(captions) == 0").reason(record, 9, 9) is None


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("aesthetic > 5", None),
        (" aesthetic>7 ", "not --where  aesthetic>7 "),
        ('aesthetic > 5 and "dog" not in caption', None),
        ("'CAT' in caption", "not --where 'CAT' in caption"),
        ("'red' in lower(caption) and words(caption) == 3", None),
        ("width * height >= 180_000 and aspect == 2", None),
        ("width == 600 and height == 300", None),
        ("license in ('CC0', 'CC-BY')", None),
        ("license not in ['CC0']", "not --where license not in ['CC0']"),
        ("'mat' in tags and tags[0] == 'cat' and len(captions) == 2", None),
        ('field("not a name") == 3', None),
        ("score > 5", "no field score"),
        ('field("no such") > 5', "no field no such"),
        ("aesthetic > 5 or score > 5", None),
        ("nothing is None", None),
        ("min(width, height) // 7 % 2 == 0 if round(aesthetic) == 6 else False", None),
        ("-abs(-1) < 0 <= float('1.5') < int('2') and str(1) + 'a' == '1a'", None),
        (
            "nothing > 5",
            "--where nothing > 5 can't be judged: '>' not supported between instances of 'NoneType' and 'int'",
        ),
        ("1 / 0", "--where 1 / 0 can't be judged: division by zero"),
        ("tags[9]", "--where tags[9] can't be judged: list index out of range"),
        ("'%0999999999d' % 1", "--where '%0999999999d' % 1 can't be judged: % is for numbers"),
    ],
)
def test_expressions(expression: str, reason: str | None) -> None:
    assert parsed("--where", expression).reason(RECORD, 300, 600) == reason


def test_several_expressions_must_all_hold() -> None:
    filters = parsed("--where", "aesthetic > 5", "--where", "license == 'MIT'")
    assert filters.reason(RECORD, 300, 600) == "not --where license == 'MIT'"


def test_strings_do_not_grow_without_bound() -> None:
    reason = parsed("--where", "len('a' * 1000000000) > 1").reason(RECORD, 9, 9)
    assert reason is not None
    assert "can't be judged" in reason


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("aesthetic >", "invalid syntax at character"),
        ("aesthetic > 5 5", "at character"),
        ("", "invalid syntax"),
        ("a = 5", "at character 3"),
        ("caption.lower()", "no function caption.lower (write lower(...)) at character 1"),
        ("aesthetic > 5 && width > 3", "write and, or, not, =="),
        ("aesthetic = 5", "write and, or, not, =="),
        ("caption.__class__ == 1", "caption.__class__ can't be used at character 1"),
        ("1 + open('x')", "no function open at character 5"),
        ("__import__('os')", "no function __import__"),
        ("[c for c in captions]", "can't be used at character 1"),
        ("9 ** 9 ** 9", "can't be used"),
        ("1 << 9", "can't be used"),
        ("(lambda: 1)()", "no function"),
        ("f'{caption}'", "can't be used"),
        ("max(captions, key=len)", "named arguments can't be used"),
        ("len(*captions)", "can't be used"),
        ("{'a': 1}", "can't be used"),
        ("b'a' == 1", "can't be used"),
        ("(x := 5)", "can't be used"),
        ("(" * 500 + "1" + ")" * 500, "--where"),
        ("1" * 3000, "3000 characters"),
        ("a\0b", "--where"),
    ],
)
def test_expressions_that_are_refused_at_the_start(expression: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed("--where", expression)
    assert says in str(caught.value)


def test_reasons_are_few_whatever_the_values() -> None:
    filters = parsed("--where", "int(score) > 3 or float(score) > 3 or tags[score]")
    records = [{"score": f"s{n}", "tags": {}} for n in range(9)] + [{"score": n, "tags": {}} for n in range(4)]
    reasons = {filters.reason(record, 9, 9) for record in records}
    about = "--where int(score) > 3 or float(score) > 3 or tags[score] can't be judged: "
    assert reasons == {about + "invalid literal for int() with base 10", about + "no such key"}


def test_limits_that_nothing_meets() -> None:
    for name in ("size", "caption-words"):
        with pytest.raises(UserError, match=f"--min-{name} 9 is more than --max-{name} 8"):
            parsed(f"--min-{name}", "9", f"--max-{name}", "8")
    for args in (("--min-size", "0"), ("--max-aspect", "0.5"), ("--max-aspect", "nan"), ("--max-aspect", "wide")):
        with pytest.raises(argparse.ArgumentError):
            parsed(*args)


def test_description_and_pickle() -> None:
    assert Filters().describe() == {}
    filters = parsed("--min-size", "9", "--where", "a > 1", "--require-caption")
    assert filters.describe() == {"min_size": 9, "require_caption": True, "where": ["a > 1"]}
    filters.reason(RECORD, 9, 9)
    assert pickle.loads(pickle.dumps(filters)) == filters


_WORDS = ["a", "b", "width", "7", "'x'", "<", "==", "+", "and", "or", "not", "in", "(", ")", "len(", "field('c')"]
_VALUES = st.integers() | st.text(max_size=5) | st.none()


@given(
    st.text(max_size=40) | st.lists(st.sampled_from(_WORDS), min_size=1, max_size=5).map(" ".join),
    st.dictionaries(st.sampled_from("abc") | st.text(max_size=5), _VALUES),
)
def test_any_text_is_judged_or_refused(expression: str, record: dict[str, Any]) -> None:
    """A record is judged alike each time, and what leaves it out is named."""
    try:
        filters = Filters(where=(expression,))
    except UserError:
        return
    verdict = filters.reason(record, 5, 7)
    assert filters.reason(dict(record), 5, 7) == verdict
    assert verdict is None or verdict.startswith("no field ") or expression in verdict


def test_the_evaluator_is_loaded_only_when_it_is_needed() -> None:
    code = "import sys, data_tools.filters; assert 'simpleeval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
