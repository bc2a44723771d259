"""What README and docs/ show of committed results is what the files hold."""

import io
import re
import subprocess

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks import __main__ as command
from benchmarks.common import results
from benchmarks.pages import facts, findings, generic, markdown, readme, study, tables, write
from benchmarks.studies import STUDIES, example

EXAMPLE = {
    "job": "own",
    "date": "2026-01-02",
    "settings": {"rounds": 3},
    "threads": 2,
    "rows": {"dense": {"loss": 1.5, "seconds": [1.0] * 9}, "small": {"loss": 2.0, "bytes": 1234}},
    "networks": {"net": {"rows": [{"asked": 2, "speedup": {"median": 2.125}}, {"asked": 3}]}},
}


def committed():
    """Whether results lie as they were committed; a study that has run here shows others."""
    asked = ["git", "status", "--porcelain", "--", "benchmarks/results"]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=results.ROOT)
    return not done.returncode and not done.stdout


def test_pages_show_what_the_files_hold():
    if not committed():
        pytest.skip("a study ran here and its files are not committed: pages show others")
    for path, text in write.pages().items():
        assert path.exists() and path.read_text() == text, (
            f"{path.relative_to(results.ROOT)} is stale: run python -m benchmarks.pages"
        )


def test_readme_is_one_screen_and_shows_six_tasks():
    text = (results.ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    rows = readme.tasks(results.ROOT).split("\n\n")[0].splitlines()
    assert len(rows) == 2 + 6 and all(row in text for row in rows)


def test_what_readme_says_its_example_prints_was_printed_by_that_code():
    found = results.load(results.files("example")[-1])
    assert found["code"] == example.digest(example.code()), "run python -m benchmarks example"
    text = (results.ROOT / "README.md").read_text()
    assert "\n".join(["```text", *found["printed"], "```"]) in text


def test_a_part_stands_between_its_marks_alone():
    text = "before\n<!-- a: begin -->\nold\n<!-- a: end -->\nafter"
    assert write.put(text, "a", "new") == ("before\n<!-- a: begin -->\nnew\n<!-- a: end -->\nafter")
    with pytest.raises(ValueError, match="wanted <!-- b: begin --> and <!-- b: end --> once each"):
        write.put(text, "b", "new")


def test_a_new_study_needs_a_row_alone(monkeypatch, tmp_path):
    name, row = next(iter(STUDIES.items()))
    monkeypatch.setitem(STUDIES, "fresh", row._replace(question="What is new?"))
    assert study.skeleton("fresh").startswith("# What is new?\n")
    page = study.measured("fresh", write.RESULTS)
    assert "`python -m benchmarks fresh`" in page and "**Not measured yet.**" in page
    fact = next(f for f in facts.facts() if f.study == "fresh")
    assert (fact.claim, fact.result, fact.minutes) == ("", facts.NONE, "not recorded")
    assert write.pages()[write.RESULTS / "fresh.md"].count("# What is new?") == 1


def test_the_command_line_lists_what_the_reviewer_s_page_shows():
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(command.listing())
    shown, page = console.export_text(), (results.ROOT / "docs" / "reviewing.md").read_text()
    for fact in facts.facts():
        assert fact.study in shown and fact.question in shown
        for said in filter(None, [fact.claim, fact.result, fact.minutes]):
            assert said in shown and said in page


@pytest.mark.parametrize("name", findings.FINDINGS)
def test_each_finding_words_the_numbers_of_a_committed_file(name):
    (*_, path) = results.files(name)
    said = findings.FINDINGS[name].result(results.load(path))
    assert re.search(r"\d", said) and len(said) < 160
    assert len(findings.FINDINGS[name].claim) <= 65 and not re.search(
        r"\d\d", findings.FINDINGS[name].claim
    )


@pytest.mark.parametrize("name", STUDIES)
def test_tables_of_each_study_are_even(name):
    for path in results.files(name):
        text = tables.of(name, path, write.RESULTS)
        assert text.strip()
        for block in re.findall(r"(?:^\|.*\n?)+", text, re.M):
            counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(counts) == 1, block[:200]


def test_a_study_without_a_table_of_its_own_shows_its_rows():
    text = generic.tables(EXAMPLE)
    assert "| threads | 2 |" in text and "settings" not in text
    assert "| dense | 1.5 |  |" in text and "| small | 2 | 1,234 |" in text
    assert "**networks, net, rows**" in text and "| 1 | 2 | 2.125 |" in text


def test_tables_for_terminals_become_markdown():
    shown = Table("a", "b", title="both")
    shown.add_row("x | y", "[1, 2]")
    assert markdown.from_rich(shown) == (
        "**both**\n\n| a | b |\n| --- | ---: |\n| x \\| y | [1, 2] |"
    )


def test_devices_are_named_in_words():
    cpu = {"platform": "cpu", "kind": "cpu", "processor": "Intel(R) Xeon(R) Processor", "cores": 2}
    assert markdown.device({"device": cpu}) == "Intel Xeon, 2 cores"
    assert markdown.device({"device": cpu | {"cores": 1}}) == "Intel Xeon, 1 core"
    assert markdown.device({"device": {"platform": "gpu", "kind": "NVIDIA H200"}}) == "NVIDIA H200"
    assert markdown.device({}) == "a device that the file does not name"


def test_the_example_is_kept_with_what_it_printed(tmp_path):
    class Timing:
        def to_json(self):
            return {"median_seconds": 1.0}

    code = (
        "import jax.numpy as jnp\n"
        "from types import SimpleNamespace as S\n"
        "fn, x, params = (lambda p, x: x @ p), jnp.ones((2, 3)), jnp.ones((3, 4))\n"
        "tuned = S(fn=fn, params=jnp.ones((3, 2)))\n"
        "net, module, accuracy = 1, 2, (lambda net: net / 2)\n"
        "ratio = S(_asdict=lambda: {'median': 2.0})\n"
        "timing = S(ratios={'small': ratio}, timings={})\n"
        "print('said')\n"
    )
    found = example.run(code, tmp_path)
    assert found["printed"] == ["said"] and found["params"] == [12, 6]
    assert found["accuracy"] == [0.5, 1.0] and found["speedup"] == {"median": 2.0}
