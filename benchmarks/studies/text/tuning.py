"""Fine-tuning of an encoder with a layer for classes on top, dense or under masks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from benchmarks.models import minilm
from benchmarks.studies.text.tasks import Split, Task
from jaxprune import training

PyTree = Any
BEFORE, WHILE, AFTER = "before", "while", "after"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of everything; the whole of it goes into the result file."""

    first_seed: int = 0
    seeds: int = 1
    layers: int = 3  # of the encoder's six, the first ones
    train: int = 4096
    test: int = 2000
    length: int = 16  # tokens
    batch: int = 32
    steps: int = 192
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)  # on trial for each method and sparsity
    tried: int = 1000  # last texts of the training part, which rates are chosen on
    every: int = 8  # steps between two renewals of masks
    kept: tuple[float, ...] = (0.05, 0.15)  # of the encoder's kernels
    speedups: tuple[float, ...] = (1.5, 2.0, 3.0)
    evidence: int = 32  # batches that scores are made from
    timed: int = 16  # texts in the batch that is timed


def logits(params: PyTree, tokens: jax.Array) -> jax.Array:
    """Classes (batch, classes) of tokens (batch, tokens)."""
    return minilm.dense(params["head"], minilm.pooled(params["encoder"], tokens))


def loss(params: PyTree, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    found = logits(params, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()


def with_head(encoder: PyTree, classes: int, seed: int) -> PyTree:
    """Pretrained parameters and a layer that is not trained."""
    width = encoder["embedding"]["word"].shape[1]
    kernel = 0.02 * jax.random.normal(jax.random.key(seed), (width, classes))
    return {"encoder": encoder, "head": {"kernel": kernel, "bias": jnp.zeros(classes)}}


class Texts:
    """A task as tokens."""

    def __init__(self, task: Task, tokenizer: Any, settings: Settings):
        texts, classes = task.train
        last = Split(texts[-settings.tried :], classes[-settings.tried :])
        wanted = (task.train, settings.train), (last, settings.tried), (task.test, settings.test)
        every = [self._tokens(split, tokenizer, count, settings.length) for split, count in wanted]
        # Rows of the table that no text reads never change: only the others are carried along.
        self.words = np.unique(np.concatenate([[minilm.PAD], *(x.ravel() for x, _ in every)]))
        self.train, self.tried, self.test = (
            (np.searchsorted(self.words, x).astype(np.int32), y) for x, y in every
        )
        self.size = settings.batch

    def known(self, encoder: PyTree) -> PyTree:
        """The encoder with the rows of its table that these texts read."""
        tables = encoder["embedding"]
        return encoder | {"embedding": tables | {"word": tables["word"][self.words]}}

    @staticmethod
    def _tokens(
        split: Split, tokenizer: Any, count: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = [found.ids[:length] for found in tokenizer.encode_batch(split.texts[:count])]
        return minilm.padded(rows, length), np.asarray(split.labels[:count], np.int32)

    def batches(self, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """One pass over the training texts in a random order."""
        order = np.random.default_rng(seed).permutation(len(self.train[0]))
        picks = order[: len(order) // self.size * self.size].reshape(-1, self.size)
        return [(self.train[0][pick], self.train[1][pick]) for pick in picks]

    def right(self, fn: Callable[..., Any], params: PyTree, of: Any = None) -> np.ndarray:
        """Which texts, by default of the test, are classified right."""
        tokens, labels = of or self.test
        size = min(100, len(tokens))
        jitted = jax.jit(fn)
        parts = [jitted(params, tokens[i : i + size]) for i in range(0, len(tokens), size)]
        return np.concatenate([np.argmax(part, -1) for part in parts]) == labels


def is_pruned(path: str, leaf: Any) -> bool:
    """The kernels of attention and perceptrons: not embeddings, norms and the classes' layer."""
    return "blocks" in path and path.endswith("kernel")


PATTERN = jp.unstructured(where=is_pruned)  # the same fraction of each kernel


def optimizer(
    method: str, sparsity: Any, rate: Any, settings: Settings
) -> optax.GradientTransformation:
    """Adam along a rise and a cosine, inside a method; the numbers may be traced."""
    steps = settings.steps
    share = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 10, 1), steps)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lambda k: rate * share(k)))
    if method == "magnitude, once":
        return training.static(inner, sparsity, score=jp.magnitude, pattern=PATTERN)
    growth = jp.schedules.cubic(0.0, sparsity, begin=steps // 10, end=steps * 3 // 5)
    if method == "movement":
        return training.movement(inner, growth, every=settings.every, pattern=PATTERN)
    return jp.prune(inner, jp.magnitude, growth, every=settings.every, pattern=PATTERN)


@functools.partial(jax.jit, static_argnames=("method", "settings"))
def step(
    params: PyTree, state: Any, numbers: Any, x: Any, y: Any, method: str, settings: Settings
) -> tuple[PyTree, Any]:
    """One step with ``numbers``, the sparsity and the highest rate."""
    sparsity, rate = numbers
    grads = jax.grad(loss)(training.forward_params(params, state), x, y)
    updates, state = optimizer(method, sparsity, rate, settings).update(grads, state, params)
    return optax.apply_updates(params, updates), state


def tuned(
    params: PyTree, texts: Texts, method: str, kept: float, rate: float, settings: Settings,
    seed: int,
) -> PyTree:  # fmt: skip
    """Parameters after fine-tuning, with zeros where the method has pruned."""
    numbers = jnp.float32(1 - kept), jnp.float32(rate)
    # Not under jit: the scores of movement begin as zeros, whose choice XLA would fold for minutes.
    state = optimizer(method, numbers[0], numbers[1], settings).init(params)
    stream: list[Any] = []
    for k in range(settings.steps):
        stream = stream or texts.batches(1000 * seed + k)
        params, state = step(params, state, numbers, *stream.pop(), method, settings)
    return training.masked_params(params, state)


def best(
    params: PyTree, texts: Texts, method: str, kept: float, settings: Settings, seed: int
) -> tuple[PyTree, dict[str, Any]]:
    """As :func:`tuned`, at the rate that is best on the tried texts; and what each rate gave."""
    found, shares = {}, {}
    for rate in settings.rates:
        found[rate] = tuned(params, texts, method, kept, rate, settings, seed)
        shares[rate] = float(texts.right(logits, found[rate], texts.tried).mean())
    rate = max(shares, key=lambda rate: shares[rate])
    return found[rate], {"rate": rate, "tried": {f"{r:g}": share for r, share in shares.items()}}
