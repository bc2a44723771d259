"""What the project's own files promise about each other: bounds, README commands, public names."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


APART = ("torch",)  # extras with an environment of their own, which no constraints pin


def requirements():
    extras = {k: v for k, v in PROJECT["optional-dependencies"].items() if k not in APART}
    lines = [line for group in (PROJECT["dependencies"], *extras.values()) for line in group]
    return [r for r in map(Requirement, lines) if r.name != PROJECT["name"]]


def pins(name):
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    return {k.lower().replace("_", "-"): v for k, v in (line.split("==") for line in lines)}


def shell_blocks():
    return re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_each_lower_bound_is_what_the_oldest_tested_python_runs(requirement):
    core = requirement in map(Requirement, PROJECT["dependencies"])
    oldest = pins("oldest.txt" if core else "py311.txt")
    assert str(requirement.specifier) == f">={oldest[requirement.name]}"


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_the_newest_tested_python_pins_within_the_bounds(requirement):
    assert requirement.specifier.contains(pins("py313.txt")[requirement.name])


def test_the_readme_opens_with_one_line_for_the_main_job_and_one_for_the_tests():
    assert shell_blocks()[:2] == [
        'pip install -e ".[bench]" && python -m benchmarks\n',
        'pip install -e ".[dev]" && python -m pytest\n',
    ]


REPOSITORY = re.compile(
    r"https://github\.com/([\w.-]+/jaxprune)\b|https://([\w.-]+)\.github\.io/jaxprune"
)
NAMING = (
    "CITATION.cff", "CONTRIBUTING.md", "README.md", "docs/conf.py", "docs/index.md",
    ".github/ISSUE_TEMPLATE/config.yml",
)  # fmt: skip


def test_all_that_names_the_repository_names_the_one_of_pyproject():
    owner = PROJECT["urls"]["Repository"].removeprefix("https://github.com/").partition("/")[0]
    files = [ROOT / name for name in NAMING] + sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in files:
        for found in REPOSITORY.finditer(path.read_text()):
            assert found[1] == f"{owner}/jaxprune" or found[2] == owner, f"{path}: {found[0]}"


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PROJECT['version']}\n" in text
    assert f'repository-code: "{PROJECT["urls"]["Repository"]}"' in text


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_opens_alone_and_says_what_to_read_next(path):
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert f'REPOSITORY = "{PROJECT["urls"]["Repository"]}"' in code[0]
    for line in "\n".join(code).splitlines():
        assert not re.match(r"\s*(from|import) benchmarks\b", line)
    (said,) = cells[1]["outputs"]
    assert re.match(r"jaxprune [\d.]+ .*; installed beside it: ", "".join(said["text"]))
    assert cells[-1]["cell_type"] == "markdown" and "".join(cells[-1]["source"]).startswith(
        "Read next: "
    )


@pytest.mark.slow
def test_the_core_imports_no_framework():
    code = "import sys, jaxprune; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unwanted = {"flax", "equinox", "chex", "haiku", "matplotlib", "sklearn", "torch", "torchax"}
    assert not unwanted & set(done.stdout.split())
