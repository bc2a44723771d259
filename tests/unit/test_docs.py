"""The code in docs/ runs, top to bottom, and prints what the page shows."""

import contextlib
import importlib.util
import io
import re
import warnings
from pathlib import Path

import pytest

from jaxprune.rules import registry

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [
    "adapters.md", "artefacts.md", "ask_for_speed.md", "axis_algebra.md", "budgets.md",
    "debug_a_frozen_dimension.md", "experts.md", "getting_started.md", "hugging_face.md",
    "masks_and_scores.md", "one_shot.md", "quantization.md", "recover.md", "stream.md",
    "structure_and_certificate.md", "training.md", "wrappers.md", "write_a_rule.md",
]  # fmt: skip
ELSEWHERE = {  # pages whose code other tests run
    "runtimes.md": "tests/runtimes/test_engines.py",
    "tensorrt.md": "tests/runtimes/test_tensorrt.py",
    "write_a_method.md": "tests/unit/training/test_docs.py",
}
# What the code of a page takes as given.
GIVEN = {
    "budgets.md": """
import jax, jax.numpy as jnp, jaxprune as jp
keys = jax.random.split(jax.random.key(0), 8)
draw = lambda k, *shape: jax.random.normal(keys[k], shape) / 4
token, position = jnp.zeros((2, 1), jnp.int32), jnp.array(3)

def decode(weights, cache, token, position):
    x = weights["table"][token]
    q, k, v = ((x @ weights[n]).reshape(2, 1, 4, 8) for n in "qkv")
    cache = {n: jax.lax.dynamic_update_slice(cache[n], new, (0, position, 0, 0))
             for n, new in (("k", k), ("v", v))}
    read = jax.nn.dot_product_attention(q, cache["k"], cache["v"])
    return (x + read.reshape(2, 1, 32) @ weights["o"]) @ weights["table"].T, cache

def block(p, x):
    return x + jnp.tanh(x @ p["up"])

def fn(params, x):
    x = jax.lax.scan(lambda x, p: (block(p, x), None), x, params["blocks"])[0]
    return jax.nn.relu(x @ params["up"]) @ params["down"]

params = {
    "weights": {"table": draw(0, 50, 32), **{n: draw(k, 32, 32) for k, n in enumerate("qkvo", 1)}},
    "cache": {n: jnp.zeros((2, 16, 4, 8)) for n in "kv"},
    "blocks": {"up": draw(6, 8, 64, 64)},
    "up": draw(7, 64, 32), "down": draw(5, 32, 4),
}
scores, states = jp.magnitude(params), [draw(0, 80, 64), draw(1, 80, 64)]
batches, x = states, states[0]
""",
    "wrappers.md": """
import warnings
import jax.numpy as jnp, optax, jaxprune as jp
params = {"w": jnp.arange(1.0, 9.0).reshape(4, 2)}
opt_state = jp.training.static(optax.sgd(0.1), 0.5).init(params)
""",
}
# Other pages need what tests need.
NEEDS = {"hugging_face.md": "transformers", "quantization.md": "qwix"}


@pytest.fixture(autouse=True)
def table():
    before = dict(registry.RULES)
    yield
    registry.RULES.clear()
    registry.RULES.update(before)


def blocks(page):
    """(line, code, what it prints or None); what needs torch is left out where that is not here."""
    text = (DOCS / page).read_text()
    if not importlib.util.find_spec("torchax"):
        text = text.replace("<!-- torch -->\n```python", "<!-- torch -->\n```")
    for found in re.finditer(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, re.S):
        yield text[: found.start()].count("\n") + 2, found[1], found[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")  # in qwix
@pytest.mark.parametrize("page", PAGES)
def test_code_prints_what_the_page_shows(page):
    if page in NEEDS:
        warnings.simplefilter("ignore")  # Flax models of transformers are deprecated.
        pytest.importorskip(NEEDS[page])
    names, seen = {}, 0
    exec(GIVEN.get(page, ""), names)
    for line, code, shown in blocks(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (line - 1) + code, str(DOCS / page), "exec"), names)
        if shown is not None:
            assert printed.getvalue() == shown
        seen += 1
    assert seen


def test_every_page_with_code_is_run():
    with_code = {path.name for path in DOCS.glob("*.md") if "```python" in path.read_text()}
    assert with_code == {*PAGES, *ELSEWHERE}
    for page, test in ELSEWHERE.items():
        assert page in (DOCS.parent / test).read_text()


def test_links_of_readme_and_pages_lead_somewhere():
    for path in [*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")]:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
        for found in re.finditer(r"\]\(([^)#\s:]*[./][^)#\s:]*)(?:#[^)]*)?\)", text):
            where = path.parent / found[1]
            assert where.exists(), f"{path}: {found[1]}"


@pytest.mark.slow
def test_readme_s_first_example_ends_small_and_accurate(tmp_path, monkeypatch, capsys):
    """It is run as it stands there."""
    pytest.importorskip("flax.nnx")
    monkeypatch.chdir(tmp_path)
    text = (DOCS.parent / "README.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], names)
    assert (tmp_path / "small").exists()
    accuracy, small = names["accuracy"], names["module"]
    assert accuracy(small) > accuracy(names["net"]) - 0.05
    assert isinstance(small, names["Net"])
    assert names["tuned"].recovery.removed > 0.2
