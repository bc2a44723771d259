"""The runs behind the study: two small networks, and how each method trains them.

All operating points and seeds of a method share one compiled program, an epoch long: the sparsity
is an argument of it, and masks that were made before training lie in the optimizer's state.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from benchmarks.common.data import Data
from jaxprune import training

PyTree = Any
ERK = jp.unstructured(jp.erk)
ONE_CUT = jp.unstructured(functools.partial(jp.global_threshold, normalize=False, floor=0))
HE = jax.nn.initializers.he_normal()


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs of one job have in common."""

    epochs: int = 8
    batch: int = 100
    rates: tuple[float, ...] = (
        0.01,
        0.03,
        0.1,
        0.3,
    )  # the dense network's best, once, is taken for all
    validation: int = 5_000  # training images that only choose the rate
    score_batches: int = 20  # for the gradient of SNIP and GraSP
    every: int = 100  # steps between renewals of gradual and dynamic masks
    drop: float = 0.3  # of SET and RigL, falling by a cosine to 0 at three quarters
    flow_rounds: int = 100  # of SynFlow
    tickets: int = 6  # rounds of iterative pruning; each halves the density
    hidden: tuple[int, ...] = (300, 100)
    channels: tuple[int, ...] = (16, 32, 64)
    deep: tuple[int, ...] = (100,) * 8  # hidden layers of the network that may collapse


QUICK = Settings(
    epochs=4, batch=20, rates=(0.1,), validation=50, score_batches=2, every=10, flow_rounds=30,
    tickets=2, hidden=(30,), channels=(4, 4), deep=(20,) * 6,
)  # fmt: skip


class Images(NamedTuple):
    """Arrays on the device; images are flat."""

    train_x: jax.Array
    train_y: jax.Array
    valid_x: jax.Array
    valid_y: jax.Array
    test_x: jax.Array
    test_y: jax.Array


class Run(NamedTuple):
    params: PyTree
    opt_state: PyTree


def on_device(data: Data, settings: Settings, train_images: int | None = None) -> Images:
    """The data, with the last training images set apart for validation."""
    flat = lambda x: jnp.asarray(x.reshape(len(x), -1))  # noqa: E731
    whole = slice(0, train_images)
    x, y = flat(data.train_x[whole]), jnp.asarray(data.train_y[whole])
    cut = (len(x) - settings.validation) // settings.batch * settings.batch
    test = flat(data.test_x), jnp.asarray(data.test_y)
    return Images(x[:cut], y[:cut], x[-settings.validation :], y[-settings.validation :], *test)


# ---- networks -------------------------------------------------------------------------------


def perceptron(key: jax.Array, widths: tuple[int, ...]) -> PyTree:
    pairs = list(zip(widths, widths[1:]))
    keys = jax.random.split(key, len(pairs))
    return {
        f"dense{i}": {"kernel": HE(k, pair), "bias": jnp.zeros(pair[1])}
        for i, (k, pair) in enumerate(zip(keys, pairs))
    }


def convolutional(key: jax.Array, channels: tuple[int, ...], classes: int) -> PyTree:
    pairs = list(zip((1, *channels), channels))
    *keys, last = jax.random.split(key, len(pairs) + 1)
    layers = {
        f"conv{i}": {"kernel": HE(k, (3, 3, *pair)), "bias": jnp.zeros(pair[1])}
        for i, (k, pair) in enumerate(zip(keys, pairs))
    }
    return layers | perceptron(last, (channels[-1], classes))


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3 x 3, stride 2, as one product: in a scan on a CPU, XLA's convolution is 20 times slower."""
    height, width = (-(-size // 2) for size in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = 2 * height - 1, 2 * width - 1
    windows = [x[:, i : i + rows : 2, j : j + columns : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(windows, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def logits(params: PyTree, x: jax.Array) -> jax.Array:
    """Convolutions of stride 2, a mean over positions, dense layers; whichever params has."""
    conv = [layer for name, layer in params.items() if name.startswith("conv")]
    dense = [layer for name, layer in params.items() if name.startswith("dense")]
    if conv:
        side = int(np.sqrt(x.shape[-1]))
        x = x.reshape(-1, side, side, 1)
    for layer in conv:
        x = jax.nn.relu(convolution(x, layer["kernel"]) + layer["bias"])
    x = x.mean((1, 2)) if conv else x
    for layer in dense[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ dense[-1]["kernel"] + dense[-1]["bias"]


def loss(params: PyTree, x: jax.Array, y: jax.Array, temperature: float = 1.0) -> jax.Array:
    scaled = logits(params, x) / temperature
    return optax.losses.softmax_cross_entropy_with_integer_labels(scaled, y).mean()


@jax.jit
def accuracy(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(logits(params, x), -1) == y)


# ---- methods --------------------------------------------------------------------------------


def optimizer(
    method: str, settings: Settings, steps: int, rate: Any, sparsity: Any, key: jax.Array
) -> optax.GradientTransformation:
    """SGD with momentum and a cosine rate, inside the method; rate and sparsity may be traced."""
    inner = optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9)
    if method == "fixed":  # masks that were made before, with training.set_masks
        return training.static(inner, 0.0)
    noise = functools.partial(jp.random, key=key)
    if method in ("set", "rigl"):
        drop = optax.cosine_decay_schedule(settings.drop, steps * 3 // 4)
        return {"set": training.set, "rigl": training.rigl}[method](
            inner, sparsity, drop_fraction=drop, every=settings.every, pattern=ERK, score=noise
        )
    kind, score = method.split(", ")
    chosen: Any = {"magnitude": jp.magnitude, "random": noise}[score]
    if kind == "one-shot":  # in the middle of the steps that gradual pruning has
        return training.one_shot(inner, sparsity, at=steps // 2, score=chosen, pattern=ERK)
    growth = jp.schedules.cubic(0.0, sparsity, begin=steps // 4, end=steps * 3 // 4)
    return jp.prune(inner, chosen, growth, pattern=ERK, every=settings.every)


STATIC = ("method", "settings", "steps")


@functools.partial(jax.jit, static_argnames=STATIC)
def begin(
    method: str, settings: Settings, steps: int, rate: Any, sparsity: Any, key: Any, params: PyTree
) -> Run:
    state = optimizer(method, settings, steps, rate, sparsity, key).init(params)
    return Run(training.forward_params(params, state), state)


@functools.partial(jax.jit, static_argnames=STATIC, donate_argnames="run")
def epoch(
    method: str,
    settings: Settings,
    steps: int,
    rate: Any,
    sparsity: Any,
    key: Any,
    run: Run,
    x: jax.Array,
    y: jax.Array,
    order: jax.Array,
) -> Run:
    """The run one epoch further on."""
    tx = optimizer(method, settings, steps, rate, sparsity, key)
    extra = {"key": jax.random.fold_in(key, 2)} if method == "set" else {}

    def step(run: Run, index: jax.Array) -> tuple[Run, None]:
        grads = jax.grad(loss)(run.params, x[index], y[index])
        updates, state = tx.update(grads, run.opt_state, run.params, **extra)
        return Run(optax.apply_updates(run.params, updates), state), None

    return jax.lax.scan(step, run, order)[0]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Everything of one network and one seed but the method."""

    settings: Settings
    images: Images
    network: str  # "perceptron" or "convolutional"
    seed: int
    rate: float

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.seed)

    @property
    def per_epoch(self) -> int:
        return len(self.images.train_x) // self.settings.batch

    @property
    def steps(self) -> int:
        return self.per_epoch * self.settings.epochs

    def params(self, key: jax.Array | None = None) -> PyTree:
        """Initial ones: for one seed the same in all methods."""
        key = jax.random.fold_in(self.key if key is None else key, 0)
        classes = int(self.images.train_y.max()) + 1
        if self.network == "convolutional":
            return convolutional(key, self.settings.channels, classes)
        inputs = self.images.train_x.shape[-1]
        return perceptron(key, (inputs, *self.settings.hidden, classes))

    def orders(self) -> list[jax.Array]:
        """The batches of each epoch: for one seed the same in all methods."""
        keys = jax.random.split(jax.random.fold_in(self.key, 1), self.settings.epochs)
        n = len(self.images.train_x)
        return [
            jax.random.permutation(k, n).reshape(self.per_epoch, self.settings.batch) for k in keys
        ]

    def train(
        self, method: str, sparsity: float, run: Run | None = None, epochs: Any = None
    ) -> Run:
        """Trains from ``run``, or the start, over the given epochs, or all."""
        fixed = method, self.settings, self.steps
        traced = jnp.float32(self.rate), jnp.float32(sparsity), self.key
        run = begin(*fixed, *traced, self.params()) if run is None else run
        for order in self.orders()[slice(*epochs) if epochs else slice(None)]:
            run = epoch(*fixed, *traced, run, self.images.train_x, self.images.train_y, order)
        return run

    def train_masked(self, masks: PyTree, params: PyTree | None = None) -> Run:
        """Trains under masks that stay, from the initial params unless told otherwise."""
        params = self.params() if params is None else params
        state = self._start(params).opt_state
        masked = Run(jp.apply_masks(params, masks), training.set_masks(state, copied(masks)))
        return self.train("fixed", 0.0, masked)

    def _start(self, params: PyTree) -> Run:
        fixed = "fixed", self.settings, self.steps
        return begin(*fixed, jnp.float32(self.rate), jnp.float32(0), self.key, params)

    def tickets(self) -> Iterator[training.Round]:
        """Iterative magnitude pruning; kept weights go back to their initial values each round."""

        def train(params: PyTree, state: PyTree, start: int, stop: int) -> tuple[PyTree, PyTree]:
            epochs = (start // self.per_epoch, stop // self.per_epoch)
            params, state = self.train("fixed", 0.0, Run(params, state), epochs)
            return params, state

        return training.iterative(
            train,
            optimizer("fixed", self.settings, self.steps, self.rate, 0.0, self.key),
            self.params(),
            1 - 0.5**self.settings.tickets,
            rounds=self.settings.tickets,
            steps=self.steps,
            pattern=ERK,
        )

    def test_accuracy(self, run: Run) -> float:
        return float(accuracy(run.params, self.images.test_x, self.images.test_y))

    def valid_accuracy(self, run: Run) -> float:
        return float(accuracy(run.params, self.images.valid_x, self.images.valid_y))

    def masks(self, method: str, sparsity: float) -> PyTree:
        """Masks made before training."""
        pick = self.orders()[0][: self.settings.score_batches].ravel()
        x, y = self.images.train_x[pick], self.images.train_y[pick]
        rounds = self.settings.flow_rounds
        return masks_at_init(method, self.params(), sparsity, self.key, x, y, rounds=rounds)


@functools.partial(jax.jit, static_argnames=("method", "rounds"))
def masks_at_init(
    method: str,
    params: PyTree,
    sparsity: Any,
    key: jax.Array,
    x: jax.Array,
    y: jax.Array,
    rounds: int,
) -> PyTree:
    """The scores that prune before training, each ranked over all layers as its paper does."""
    noise = jp.random(params, key=key, step=0)
    if method == "SynFlow":
        flow = functools.partial(jp.scores.synflow, fn=logits, args=(x[:1],))
        return jp.scores.in_rounds(flow, ONE_CUT, rounds=rounds)(params, sparsity)
    if method == "GraSP":  # the temperature is that of its authors' code
        tempered = functools.partial(loss, temperature=200.0)
        hvp = jp.scores.evidence.gradient_flow(tempered, params, [(x, y)])
        return ONE_CUT(jp.scores.grasp(params, hvp=hvp), sparsity)
    made: dict[str, Callable[[], PyTree]] = {  # only one of them is computed
        "SNIP": lambda: ONE_CUT(
            jp.scores.snip(params, grad=jax.grad(loss)(params, x, y)), sparsity
        ),
        "magnitude": lambda: ONE_CUT(jp.magnitude(params), sparsity),
        "dense": lambda: jp.unstructured()(noise, 0.0),
        "random, uniform": lambda: jp.unstructured()(noise, sparsity),
        "random, ERK": lambda: ERK(noise, sparsity),
    }
    return made[method]()


def copied(tree: PyTree) -> PyTree:
    """A copy, so that training may donate it."""
    return jax.tree.map(jnp.copy, tree)


# ---- collapse, without training -------------------------------------------------------------


def collapse(
    method: str, sparsity: float, settings: Settings, images: Images, seed: int
) -> dict[str, Any]:
    """What a mask made at initialisation leaves of a deep network."""
    trainer = Trainer(settings, images, "perceptron", seed, 0.0)
    classes = int(images.train_y.max()) + 1
    key = jax.random.fold_in(trainer.key, 0)
    params = perceptron(key, (images.train_x.shape[-1], *settings.deep, classes))
    pick = trainer.orders()[0][: settings.score_batches].ravel()
    x, y = images.train_x[pick], images.train_y[pick]
    rounds = settings.flow_rounds
    masks = masks_at_init(method, params, sparsity, trainer.key, x, y, rounds=rounds)
    active = _active(params, masks, x[:1])
    return {
        "collapsed": len(jp.sanity.collapsed(active)),
        "layers": len(settings.deep) + 1,
        "kept_per_layer": _counts(masks),
        "active_per_layer": _counts(active),
    }


_active = jax.jit(functools.partial(jp.sanity.active, logits))


def _counts(masks: PyTree) -> list[int]:
    return [int(np.sum(np.asarray(m))) for m in jax.tree.leaves(masks) if np.ndim(m)]
