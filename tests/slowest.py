"""Writes ``tests/slowest.md``: ``python -m tests.slowest REPORT.xml`` after
``python -m pytest --whole --junitxml REPORT.xml``.
"""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path

from benchmarks.common import results

PAGE = Path(__file__).with_name("slowest.md")
SHOWN = 60


def seconds_of(report: Path) -> tuple[Counter[str], Counter[str]]:
    """Returns seconds and numbers of cases by test function, setup and teardown included."""
    seconds: Counter[str] = Counter()
    cases: Counter[str] = Counter()
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.attrib['classname']}.{case.attrib['name'].partition('[')[0]}"
        seconds[name] += float(case.attrib["time"])
        cases[name] += 1
    return seconds, cases


def page(seconds: Counter[str], cases: Counter[str]) -> str:
    """Returns the slowest functions as a table, below the sums of the folders."""
    folders: dict[str, float] = defaultdict(float)
    for name, took in seconds.items():
        folders[name.split(".")[1]] += took
    sums = ", ".join(f"{folder} {took:.0f} s" for folder, took in sorted(folders.items()))
    lines = [
        "# The slowest tests", "",
        f"{results.device_name()}, {results.today()}; seconds of all cases together, first "
        "compilations included.", "",
        f"In all {sum(seconds.values()):.0f} s: {sums}.", "",
        "| test | cases | s |", "|---|---|---|",
    ]  # fmt: skip
    rows = (f"| {n.removeprefix('tests.')} | {cases[n]} | {s:.1f} |"
            for n, s in seconds.most_common(SHOWN))  # fmt: skip
    return "\n".join([*lines, *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the times of the slowest tests.")
    parser.add_argument("report", type=Path)
    PAGE.write_text(page(*seconds_of(parser.parse_args().report)))


if __name__ == "__main__":
    main()
