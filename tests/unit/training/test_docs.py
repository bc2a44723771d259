"""docs/write_a_method.md runs, and its method is as short as the page says."""

import contextlib
import io

import pytest

from tests.unit.test_docs import DOCS, blocks

PAGE = "write_a_method.md"


@pytest.mark.slow
def test_the_page_runs_and_prints_what_it_shows() -> None:
    names: dict[str, object] = {}
    for line, code, shown in blocks(PAGE):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (line - 1) + code, str(DOCS / PAGE), "exec"), names)
        assert printed.getvalue() == (shown or "")


def test_a_method_is_ten_lines() -> None:
    _, code, _ = next(blocks(PAGE))
    assert len(code[code.index("def ") :].strip().splitlines()) <= 10
