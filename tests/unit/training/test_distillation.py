"""Distillation losses against their formulas in numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logits(temperature: float) -> None:
    student, teacher = normal(5, 7), normal(5, 7)
    s, t = softmax(student / temperature), softmax(teacher / temperature)
    wanted = temperature**2 * (t * np.log(t / s)).sum(axis=-1)
    got = jp.training.logit_loss(student, teacher, temperature=temperature)
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    half = jp.training.logit_loss(jnp.asarray(student, jnp.bfloat16), teacher)
    assert half.dtype == jnp.float32


@pytest.mark.slow
def test_the_gradient_keeps_its_size_over_temperatures() -> None:
    student, teacher = normal(6), normal(6)
    norms = [
        float(jnp.linalg.norm(jax.grad(jp.training.logit_loss)(student, teacher, temperature=t)))
        for t in (10.0, 100.0)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.2)


@pytest.mark.slow
def test_hidden_states() -> None:
    student, teacher, p = normal(2, 3, 4), normal(2, 3, 6), normal(4, 6)
    wanted = np.square(student @ p - teacher).mean(axis=-1)
    np.testing.assert_allclose(
        jp.training.hidden_loss(student, teacher, jnp.asarray(p)), wanted, rtol=1e-4
    )
    same = jp.training.hidden_loss(teacher, teacher)
    assert same.shape == (2, 3) and not same.any()


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), [(3, 5), (5, 3)])
def test_projections_are_orthonormal(student: int, teacher: int) -> None:
    p = np.asarray(jp.training.projection(jax.random.key(0), student, teacher))
    small = p @ p.T if student < teacher else p.T @ p
    np.testing.assert_allclose(small, np.eye(min(student, teacher)), atol=1e-5)


@pytest.mark.slow
def test_attention_maps_of_fewer_heads() -> None:
    student, teacher = softmax(normal(2, 3, 4, 5)), softmax(normal(2, 6, 4, 5))
    s, t = student.mean(axis=1), teacher.mean(axis=1)
    wanted = (t * np.log(t / s)).sum(axis=-1)
    np.testing.assert_allclose(jp.training.attention_loss(student, teacher), wanted, rtol=1e-4)


@pytest.mark.slow
def test_masked_keys_cost_nothing() -> None:
    causal = softmax(np.where(np.tri(4, dtype=bool), normal(1, 2, 4, 4), -np.inf))
    loss = jp.training.attention_loss
    assert np.abs(loss(causal, causal)).max() < 1e-6
    grad = jax.grad(lambda a: loss(a, causal).sum())(causal)
    assert np.isfinite(grad).all()


@pytest.mark.slow
def test_activation_maps_of_fewer_channels() -> None:
    student, teacher = normal(2, 4, 4, 3), normal(2, 4, 4, 8)
    maps = [np.square(x).sum(axis=-1).reshape(2, -1) for x in (student, teacher)]
    s, t = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps)
    wanted = np.linalg.norm(s - t, axis=1)
    loss = jp.training.activation_map_loss
    np.testing.assert_allclose(loss(student, teacher), wanted, rtol=1e-4)
    assert np.isfinite(jax.grad(lambda x: loss(x, teacher).sum())(jnp.zeros((2, 4, 4, 3)))).all()


@pytest.mark.slow
def test_a_pruned_student_learns_from_any_teacher() -> None:
    """Logits, hidden states and a learned projection in one loss; no gradient to the teacher."""
    dense = {"up": normal(3, 6), "down": normal(6, 4)}
    x = normal(8, 3)

    def outputs(params: Any, x: Any) -> Any:
        hidden = jnp.tanh(x @ params["up"])
        return {"hidden": hidden, "logits": hidden @ params["down"]}

    def loss(student: Any, teacher: Any) -> Any:
        hidden = jp.training.hidden_loss(
            student["hidden"], teacher["hidden"], student["projection"]
        )
        return hidden + jp.training.logit_loss(student["logits"], teacher["logits"], temperature=2)

    def student(params: Any, x: Any) -> Any:
        return outputs(params["net"], x) | {"projection": params["projection"]}

    total = jp.training.distill(student, lambda x: outputs(dense, x), loss)
    params = {
        "net": {"up": normal(3, 2), "down": normal(2, 4)},
        "projection": jp.training.projection(jax.random.key(0), 2, 6),
    }
    step = jax.jit(lambda p: jax.tree.map(lambda w, g: w - 0.1 * g, p, jax.grad(total)(p, x)))
    before = float(total(params, x))
    for _ in range(20):
        params = step(params)
    assert float(total(params, x)) < 0.7 * before
    by_teacher = jax.grad(
        lambda d: jp.training.distill(student, lambda x: outputs(d, x), loss)(params, x)
    )(dense)
    assert not any(np.any(g) for g in jax.tree.leaves(by_teacher))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: jp.training.logit_loss(jnp.ones(3), jnp.ones(4)),
            r"logits have the shape \(3,\) in the student and \(4,\) in the teacher",
        ),
        (
            lambda: jp.training.logit_loss(jnp.ones(3), jnp.ones(3), temperature=0),
            "temperature is 0; wanted a positive number such as 2.0",
        ),
        (
            lambda: jp.training.hidden_loss(jnp.ones(3), jnp.ones(4)),
            r"hidden states have the shape \(3,\) in the student",
        ),
        (
            lambda: jp.training.hidden_loss(jnp.ones(3), jnp.ones(4), jnp.ones((4, 3))),
            r"projection has the shape \(4, 3\); wanted \(3, 4\), from the student's width",
        ),
        (
            lambda: jp.training.attention_loss(jnp.ones((1, 2, 2)), jnp.ones((1, 3, 3))),
            r"attention maps, without heads, have the shape \(2, 2\)",
        ),
        (
            lambda: jp.training.activation_map_loss(jnp.ones((1, 2, 3)), jnp.ones((1, 4, 3))),
            r"activation maps, without channels, have the shape \(1, 2\)",
        ),
        (
            lambda: jp.training.attention_loss(jnp.ones((2, 2)), jnp.ones((2, 2))),
            r"attention maps have the shape \(2, 2\); wanted \(..., heads, queries, keys\)",
        ),
        (
            lambda: jp.training.activation_map_loss(jnp.ones((2, 3, 4)), jnp.ones(4)),
            r"activation maps have the shape \(4,\); wanted \(batch, ..., channels\)",
        ),
        (
            lambda: jp.training.logit_loss(jnp.ones(()), jnp.ones(())),
            r"logits have the shape \(\); wanted \(..., classes\)",
        ),
        (
            lambda: jp.training.hidden_loss(jnp.ones(()), jnp.ones(3)),
            r"hidden states have the shape \(\); wanted \(..., features\)",
        ),
    ],
)
def test_outputs_that_do_not_fit_are_named(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
