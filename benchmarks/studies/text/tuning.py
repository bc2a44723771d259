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
    rate: float = 3e-4
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
        train = self._tokens(task.train, tokenizer, settings.train, settings.length)
        test = self._tokens(task.test, tokenizer, settings.test, settings.length)
        # Rows of the table that no text reads never change: only the others are carried along.
        self.words = np.unique(np.concatenate([[minilm.PAD], train[0].ravel(), test[0].ravel()]))
        self.train, self.test = (
            (np.searchsorted(self.words, x).astype(np.int32), y) for x, y in (train, test)
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

    def right(self, fn: Callable[..., Any], params: PyTree) -> np.ndarray:
        """Which texts of the test are classified right."""
        tokens, labels = self.test
        size = min(100, len(tokens))
        jitted = jax.jit(fn)
        parts = [jitted(params, tokens[i : i + size]) for i in range(0, len(tokens), size)]
        return np.concatenate([np.argmax(part, -1) for part in parts]) == labels


def is_pruned(path: str, leaf: Any) -> bool:
    """The kernels of attention and perceptrons: not embeddings, norms and the classes' layer."""
    return "blocks" in path and path.endswith("kernel")


PATTERN = jp.unstructured(where=is_pruned)  # the same fraction of each kernel


def optimizer(method: str, sparsity: Any, settings: Settings) -> optax.GradientTransformation:
    """Adam along a rise and a cosine, inside a method; the sparsity may be traced."""
    steps = settings.steps
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.rate, max(steps // 10, 1), steps)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    if method == "magnitude, once":
        return training.static(inner, sparsity, score=jp.magnitude, pattern=PATTERN)
    growth = jp.schedules.cubic(0.0, sparsity, begin=steps // 10, end=steps * 3 // 5)
    if method == "movement":
        return training.movement(inner, growth, every=settings.every, pattern=PATTERN)
    return jp.prune(inner, jp.magnitude, growth, every=settings.every, pattern=PATTERN)


@functools.partial(jax.jit, static_argnames=("method", "settings"))
def step(
    params: PyTree, state: Any, sparsity: Any, x: Any, y: Any, method: str, settings: Settings
) -> tuple[PyTree, Any]:
    grads = jax.grad(loss)(training.forward_params(params, state), x, y)
    updates, state = optimizer(method, sparsity, settings).update(grads, state, params)
    return optax.apply_updates(params, updates), state


def tuned(
    params: PyTree, texts: Texts, method: str, kept: float, settings: Settings, seed: int
) -> PyTree:
    """Parameters after fine-tuning, with zeros where the method has pruned."""
    sparsity = jnp.float32(1 - kept)
    # Not under jit: the scores of movement begin as zeros, whose choice XLA would fold for minutes.
    state = optimizer(method, sparsity, settings).init(params)
    stream: list[Any] = []
    for k in range(settings.steps):
        stream = stream or texts.batches(1000 * seed + k)
        params, state = step(params, state, sparsity, *stream.pop(), method, settings)
    return training.masked_params(params, state)
