"""One study's page: its command, how long it takes, and the tables of its committed files."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import results
from benchmarks.pages import facts, markdown, tables
from benchmarks.studies import STUDIES


def skeleton(name: str) -> str:
    """Returns the page of a study that has none: its question, and the marks of what is written."""
    return f"""# {STUDIES[name].question}

<!-- measured: begin -->
<!-- measured: end -->
"""


def measured(name: str, at: Path) -> str:
    """Returns what is written of a study: how to run it, and a table for each committed file."""
    files = results.files(name)
    parts = [_command(name)]
    if not files:
        parts.append(
            f"**Not measured yet.** {facts.NONE.capitalize()}; the command above writes "
            f"`benchmarks/results/<device>/{name}.json`, `python -m benchmarks.pages` this page."
        )
    return "\n\n".join([*parts, *(_file(name, path, at) for path in files)])


def newest(name: str, at: Path) -> str:
    """Returns the table of the file measured last, for a page that tells of several studies."""
    files = results.files(name)
    return _file(name, files[-1], at) if files else f"Not measured yet: `{_call(name)}`."


def _command(name: str) -> str:
    fact = next(f for f in facts.facts() if f.study == name)
    command = _call(name)
    look = f"; a look of minutes: `{command} --quick`" if fact.quick else ""
    return f"`{command}` (minutes of a whole run: {fact.minutes}{look})."


def _call(name: str) -> str:
    return f"python -m benchmarks{'' if name == 'main' else f' {name}'}"


def _file(name: str, path: Path, at: Path) -> str:
    found = results.load(path)
    said = [markdown.device(found), markdown.versions(found), markdown.days(found)]
    facts = ", ".join(part for part in said if part)
    return f"{facts}, {markdown.link(path, at)}:\n\n{tables.of(name, path, at)}"
