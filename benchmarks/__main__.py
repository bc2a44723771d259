"""``python -m benchmarks [STUDY]``: the main job, or one of the studies that ``--list`` shows."""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.common import results
from benchmarks.pages.facts import MINUTES, facts
from benchmarks.studies import STUDIES


def main(argv: Sequence[str] | None = None) -> None:
    args = list(sys.argv[1:] if argv is None else argv)
    if "--list" in args:
        return Console(width=110).print(listing())
    named = bool(args) and not args[0].startswith("-")
    run(args.pop(0) if named else "main", args)


def run(name: str, args: list[str]) -> None:
    """Runs one study; notes how long it took, unless it was only a look."""
    if name not in STUDIES:
        sys.exit(f"no study {name!r}; python -m benchmarks --list shows all: {', '.join(STUDIES)}")
    options, begin = arguments(name, args), time.monotonic()
    importlib.import_module(f"benchmarks.studies.{STUDIES[name].module}").main(options)
    if not args:
        note(name, (time.monotonic() - begin) / 60)


def arguments(name: str, args: list[str]) -> list[str]:
    """What a study is given: ``--quick`` becomes its options of a look, apart from the results."""
    quick = STUDIES[name].quick
    if "--quick" not in args:
        return args
    if quick is None:
        sys.exit(f"{name} has no quick way: its options are python -m benchmarks {name} --help")
    given = [arg for arg in args if arg != "--quick"]
    if "--results" in given or name == "main":
        return [*quick, *given]
    folder = Path(tempfile.mkdtemp(prefix="jaxprune-"))
    print(f"a look only: results go to {folder}")
    return [*quick, *given, "--results", str(folder)]


def note(name: str, minutes: float, root: Path = results.FOLDER) -> None:
    """Saves how long a whole run took on this device."""
    path = results.folder(root) / MINUTES
    found = results.load(path) if path.exists() else {}
    found[name] = {"minutes": round(minutes, 1), "date": results.today()}
    results.save(dict(sorted(found.items())), path)


def listing(root: Path = results.FOLDER) -> Table:
    """Returns all studies: questions, what is claimed and committed, minutes of whole runs."""
    table = Table("study", "question, claim, result", "minutes", "quick",
                  title="python -m benchmarks STUDY", show_lines=True)  # fmt: skip
    for fact in facts(root):
        said = [fact.question, fact.claim, fact.result]
        look = "--quick" if fact.quick else ""
        table.add_row(fact.study, "\n".join(filter(None, said)), fact.minutes, look)
    return table


if __name__ == "__main__":
    main()
