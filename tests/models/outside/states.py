"""Whole steps: training with optimizer states, caches, averages; the state goes out again."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from tests.models.outside.model import Model, Models, floats, tokens, weights

MODELS = Models()
ROWS, TARGETS = floats(4, 6), floats(4, 6, seed=1)


def mlp(p: Any, x: Any) -> Any:
    h = jax.nn.gelu(x @ p["w1"] + p["b1"])
    return jax.nn.gelu(h @ p["w2"] + p["b2"]) @ p["w3"]


def mlp_params() -> Any:
    return weights(w1=(6, 16), b1=(16,), w2=(16, 12), b2=(12,), w3=(12, 6))


@MODELS("states/Training step, adamw", optax.adamw, 1e-2, eps_root=1e-8)
@MODELS("states/Training step, SGD with momentum", optax.sgd, 1e-2, momentum=0.9)
@MODELS("states/Training step, lion", optax.lion, 1e-2)
@MODELS("states/Training step, rmsprop", optax.rmsprop, 1e-2, eps=1e-3)
def training(optimizer: Any, *args: Any, **kwargs: Any) -> Model:
    tx, params = optimizer(*args, **kwargs), mlp_params()

    def fn(tree: Any, x: Any, y: Any) -> Any:
        p, state = tree
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((mlp(p, x) - y) ** 2))(p)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state, loss

    return Model(fn, (params, tx.init(params)), (ROWS, TARGETS))


@MODELS("states/Training step, clipped by the global norm")
def clipped() -> Model:
    tx = optax.chain(
        optax.clip_by_global_norm(0.1),
        optax.adam(optax.cosine_decay_schedule(0.1, 9), eps_root=1e-8),
    )
    return training(lambda: tx)


@MODELS("states/Gradients accumulated in a scan")
def accumulated() -> Model:
    def fn(p: Any, xs: Any, ys: Any) -> Any:
        def step(total: Any, batch: Any) -> Any:
            x, y = batch
            grads = jax.grad(lambda p: jnp.mean((mlp(p, x) - y) ** 2))(p)
            return jax.tree.map(jnp.add, total, grads), None

        zero = jax.tree.map(jnp.zeros_like, p)
        grads = jax.lax.scan(step, zero, (xs, ys))[0]
        return jax.tree.map(lambda w, g: w - 0.1 * g, p, grads)

    return Model(fn, mlp_params(), (floats(3, 4, 6), floats(3, 4, 6, seed=1)))


@MODELS("states/Three steps of SGD in a scan")
def several_steps() -> Model:
    def fn(p: Any, xs: Any, ys: Any) -> Any:
        def step(p: Any, batch: Any) -> Any:
            x, y = batch
            loss, grads = jax.value_and_grad(lambda p: jnp.mean((mlp(p, x) - y) ** 2))(p)
            return jax.tree.map(lambda w, g: w - 0.1 * g, p, grads), loss

        return jax.lax.scan(step, p, (xs, ys))

    return Model(fn, mlp_params(), (floats(3, 4, 6), floats(3, 4, 6, seed=1)))


@MODELS("states/Inner loop of MAML")
def maml() -> Model:
    def fn(p: Any, x: Any, y: Any) -> Any:
        grads = jax.grad(lambda p: jnp.mean((mlp(p, x) - y) ** 2))(p)
        return mlp(jax.tree.map(lambda w, g: w - 0.1 * g, p, grads), x)

    return Model(fn, mlp_params(), (ROWS, TARGETS))


@MODELS("states/Gradients per example")
def per_example() -> Model:
    def fn(p: Any, x: Any, y: Any) -> Any:
        def norm(x: Any, y: Any) -> Any:
            grads = jax.grad(lambda p: jnp.sum((mlp(p, x) - y) ** 2))(p)
            return optax.global_norm(grads)

        return jax.vmap(norm)(x, y)

    return Model(fn, mlp_params(), (ROWS, TARGETS))


@MODELS("states/Teacher by moving average")
def teacher() -> Model:
    """BYOL: a loss against the average's output, and the average moved on."""
    both = {"online": mlp_params(), "teacher": jax.tree.map(lambda w: w * 0.9, mlp_params())}

    def fn(p: Any, x: Any) -> Any:
        goal = jax.lax.stop_gradient(mlp(p["teacher"], x))
        loss = optax.cosine_distance(mlp(p["online"], x), goal).mean()
        new = optax.incremental_update(p["online"], p["teacher"], 0.1)
        return loss, {"online": p["online"], "teacher": new}

    return Model(fn, both, (ROWS,))


@MODELS("states/Cached decoding, grouped queries")
def decode() -> Model:
    """One token written into a ring of six at position three."""
    params = weights(embed=(40, 16), q=(16, 32), k=(16, 16), v=(16, 16), o=(32, 16))
    params |= {"keys": floats(2, 6, 2, 8, seed=8), "values": floats(2, 6, 2, 8, seed=9)}

    def fn(p: Any, ids: Any, at: Any) -> Any:
        x = p["embed"][ids]
        q, k, v = ((x @ p[n]).reshape(2, 1, -1, 8) for n in "qkv")
        keys = jax.lax.dynamic_update_slice_in_dim(p["keys"], k, at, 1)
        values = jax.lax.dynamic_update_slice_in_dim(p["values"], v, at, 1)
        logits = jnp.einsum("bkgd,btkd->bkgt", q.reshape(2, 2, 2, 8), keys) / 8**0.5
        logits = jnp.where(jnp.arange(6) <= at, logits, -1e9)
        y = jnp.einsum("bkgt,btkd->bkgd", jax.nn.softmax(logits), values)
        logits = (x + y.reshape(2, 1, 32) @ p["o"]) @ p["embed"].T
        return logits, {**p, "keys": keys, "values": values}

    return Model(fn, params, (tokens(2, 1), jnp.int32(3)))


@MODELS("states/Sampling loop with a cache")
def sampling() -> Model:
    """Four tokens drawn one after another, in a loop that carries the cache."""
    params = weights(embed=(40, 16), q=(16, 16), k=(16, 16), v=(16, 16), o=(16, 16))

    def fn(p: Any, first: Any) -> Any:
        def step(carry: Any, i: Any) -> Any:
            ids, keys, values = carry
            x = p["embed"][ids]
            keys, values = keys.at[:, i].set(x @ p["k"]), values.at[:, i].set(x @ p["v"])
            logits = jnp.einsum("bd,btd->bt", x @ p["q"], keys)
            logits = jnp.where(jnp.arange(4) <= i, logits, -1e9)
            y = jnp.einsum("bt,btd->bd", jax.nn.softmax(logits), values)
            logits = (x + y @ p["o"]) @ p["embed"].T
            return (jnp.argmax(logits, -1), keys, values), logits

        empty = jnp.zeros((2, 4, 16))
        return jax.lax.scan(step, (first, empty, empty), jnp.arange(4))[1]

    return Model(fn, params, (tokens(2),))


@MODELS("states/Generator and discriminator step")
def gan() -> Model:
    params = {"g": weights(w1=(5, 16), w2=(16, 6)), "d": weights(w1=(6, 12), w2=(12, 1))}

    def net(p: Any, x: Any) -> Any:
        return jax.nn.leaky_relu(x @ p["w1"]) @ p["w2"]

    def fn(p: Any, z: Any, real: Any) -> Any:
        def loss_d(d: Any) -> Any:
            fake = jax.lax.stop_gradient(net(p["g"], z))
            return jnp.mean(jax.nn.softplus(net(d, fake)) + jax.nn.softplus(-net(d, real)))

        def loss_g(g: Any) -> Any:
            return jnp.mean(jax.nn.softplus(-net(p["d"], net(g, z))))

        grads = {"g": jax.grad(loss_g)(p["g"]), "d": jax.grad(loss_d)(p["d"])}
        return jax.tree.map(lambda w, g: w - 0.1 * g, p, grads)

    return Model(fn, params, (floats(4, 5), ROWS))
