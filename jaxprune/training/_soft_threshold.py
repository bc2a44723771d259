"""Soft threshold reparameterisation (STR): each leaf learns the threshold that prunes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.patterns import threshold
from jaxprune.patterns.choose import is_kernel
from jaxprune.training.core import MaskState
from jaxprune.training.dense import Chosen, dense_method
from jaxprune.training.landing import is_placeholder, where_kept
from jaxprune.training.straight_through import check_rate
from jaxprune.typing import Masks, Params, Scores, Where


class SoftThresholds(NamedTuple):
    """The memory of :func:`soft_threshold`."""

    thresholds: Any  # float32, shape () for each leaf of params: s before the logistic function


def shrink(params: Params, masks: Masks, thresholds: Any) -> Params:
    r"""Returns :math:`\operatorname{sign}(w) \max(|w| - \sigma(s), 0)` where masks are kept.

    Leaves that are never pruned (scalar masks) stay as they are.

    Example:
      >>> import jax.numpy as jnp
      >>> w, s = {"w": jnp.array([2.0, -0.25])}, {"w": jnp.float32(0.0)}
      >>> shrink(w, {"w": jnp.abs(w["w"]) > 0.5}, s)["w"].tolist()
      [1.5, 0.0]
    """

    def leaf(w: Any, mask: Any, s: Any) -> jax.Array:
        if mask.ndim == 0:
            return w
        return jnp.where(mask, w - (jnp.sign(w) * jax.nn.sigmoid(s)).astype(w.dtype), 0)

    return jax.tree.map(leaf, params, masks, thresholds)


def soft_threshold(
    inner: optax.GradientTransformation,
    decay: float,
    *,
    init: float = -5.0,
    rate: float = 0.1,
    where: Where = is_kernel,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer with STR: the network computes with shrunk weights,

    .. math:: \tilde w = \operatorname{sign}(w) \max(|w| - \sigma(s_l), 0)

    and each leaf's :math:`s_l` learns by gradient descent with weight decay, which pulls it from
    ``init`` up to 0 and so prunes. The density follows from decay and rate; watch ``jp.density``.

    Args:
      inner: any optax transformation; the paper decays weights by the same decay.
      decay: the weight decay of the thresholds.
      init: the first value of all :math:`s_l`; negative, so that :math:`\sigma(s_l)` is small.
      rate: learning rate of the thresholds.
      where: (path, leaf) -> whether the leaf has a threshold.

    Returns:
      An optax transformation with :class:`jp.training.MaskState`, whose ``memory`` has the
      ``thresholds``. The loss must be computed at ``jp.training.forward_params(params, state)``,
      which also gives the sparse network in the end.

    Raises:
      ValueError: for a negative decay or rate.

    Example:
      >>> import jaxprune as jp, optax
      >>> tx = jp.training.soft_threshold(optax.sgd(0.1, momentum=0.9), 5e-4)

    References:
      Kusupati et al., `STR <https://arxiv.org/abs/2002.03231>`__, 2020, equations 1 to 5. There
      thresholds learn with the optimizer of the weights; here by plain gradient descent.
    """
    check_rate("decay", decay)
    check_rate("rate", rate)
    pattern = threshold(0.0, where=where)

    def margins(params: Params, thresholds: Any) -> Scores:
        """How far each weight is above its threshold, and just below 0 where it isn't."""

        def leaf(w: Any, s: Any) -> jax.Array:
            gap = jnp.abs(w.astype(jnp.float32)) - jax.nn.sigmoid(s)
            return jnp.where(gap > 0, gap, jnp.minimum(gap, -1.0))

        return jax.tree.map(leaf, params, thresholds)

    def first(params: Params, **evidence: Any) -> Scores:
        return margins(params, memory(params, None).thresholds)

    def memory(params: Params, masks: Any) -> SoftThresholds:
        if is_placeholder(params):
            return SoftThresholds(params)
        return SoftThresholds(jax.tree.map(lambda w: jnp.full((), init, jnp.float32), params))

    def remember(params: Params, grad: Any, state: MaskState) -> SoftThresholds:
        def leaf(s: Any, w: Any, g: Any, mask: Any) -> jax.Array:
            if mask.ndim == 0:
                return s
            pushed = jnp.where(mask, jnp.sign(w) * g, 0).astype(jnp.float32)
            slope = jax.nn.sigmoid(s) * jax.nn.sigmoid(-s)
            return s - jnp.float32(rate) * (jnp.float32(decay) * s - slope * jnp.sum(pushed))

        old = state.memory.thresholds
        return SoftThresholds(jax.tree.map(leaf, old, params, grad, state.masks))

    def choose(params: Any, masks: Masks, memory: Any, now: Any, **evidence: Any) -> Chosen:
        return pattern(margins(params, memory.thresholds), None), memory

    return dense_method(
        inner,
        0.0,
        choose,
        pattern=pattern,
        start=first,
        memory=memory,
        gradient=lambda params, grad, state: where_kept(state.masks, grad),
        remember=remember,
        name="jp.training.soft_threshold",
    )
