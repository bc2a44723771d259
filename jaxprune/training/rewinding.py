"""Iterative pruning in rounds of training, with rewinding: lottery tickets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune._progress import Progress, check, working
from jaxprune.masks import apply_masks
from jaxprune.patterns import UNSTRUCTURED
from jaxprune.schedules import exponential
from jaxprune.scores.weights import magnitude
from jaxprune.training.core import MaskState, check_renewed, check_score, scored
from jaxprune.training.landing import hold
from jaxprune.training.renewal import strong
from jaxprune.training.sparse_params import KeepParamsSparseState
from jaxprune.typing import Masks, Params, PatternFn, ScoreFn

Train = Callable[[Params, Any, int, int], tuple[Params, Any]]
Rewind = Literal["weights", "learning rate", "reset"]


class Round(NamedTuple):
    """One trained network of :func:`iterative`; arrays only, so that a checkpoint can hold it."""

    index: Any  # 0 for the dense network, then 1, 2, ...
    masks: Masks  # that it was trained on
    params: Params  # after training
    opt_state: Any
    early: tuple[Params, Any]  # params and state at the step that is rewound to
    rewind_to: Any  # that step


def set_masks(opt_state: Any, masks: Masks) -> Any:
    """Returns ``opt_state`` with other masks in the training method that it holds.

    Raises:
      ValueError: when it holds none, or the masks have other shapes than its own.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp, optax
      >>> params = {"w": jnp.ones((1, 2))}
      >>> state = jp.training.static(optax.adam(1e-3), 0.0).init(params)
      >>> state = jp.training.set_masks(state, {"w": jnp.array([[True, False]])})
      >>> jp.training.forward_params(params, state)["w"].tolist()
      [[1.0, 0.0]]
    """
    kinds = MaskState | KeepParamsSparseState
    found: list[Any] = []

    def node(state: Any) -> Any:
        if not isinstance(state, kinds):
            return state
        found.append(state)
        check_renewed(masks, state.masks)
        return state._replace(masks=strong(masks))

    opt_state = jax.tree.map(node, opt_state, is_leaf=lambda x: isinstance(x, kinds))
    if not found:
        raise ValueError(
            "opt_state holds no masks to set; build the optimizer as jp.training.static(inner, 0), "
            "which keeps everything until it is given masks"
        )
    return opt_state


def iterative(
    train: Train,
    tx: optax.GradientTransformation,
    params: Params,
    sparsity: float,
    *,
    rounds: int,
    steps: int,
    rewind: Rewind = "weights",
    rewind_to: int = 0,
    score: ScoreFn = magnitude,
    pattern: PatternFn = UNSTRUCTURED,
    resume: Round | None = None,
    progress: Progress = None,
) -> Iterator[Round]:
    r"""Yields a trained network per round of pruning, each sparser: iterative magnitude pruning.

    Round 0 trains the dense network for ``steps`` steps. Each further round prunes the trained
    weights of lowest score, the same fraction of those that are left, so that after round r the
    density is :math:`(1 - s)^{r / R}`; then it goes back and trains the rest again:

    * "weights": kept weights and the optimizer's state, with its schedules, are those of step
      ``rewind_to``; training goes on from there.
    * "learning rate": the optimizer's state and step are rewound, weights stay as trained.
    * "reset": weights are those of the start, whatever ``rewind_to`` is.

    Nothing is computed before the first ``next``, and only one round is held at a time.

    Args:
      train: ``(params, opt_state, start, stop) -> (params, opt_state)``, which does the steps
        start, ..., stop - 1; a plain loop over a jitted step, or a scan. It may donate.
      tx: the optimizer of ``train``, ``jp.training.static(inner, 0.0)`` or a chain with it, whose
        state holds the masks.
      params: at the start.
      sparsity: after the last round, in [0, 1).
      rounds: R, how often to prune.
      steps: the steps of a whole training.
      rewind: where each round begins.
      rewind_to: the step, below ``steps``. 0 is the start.
      score: the score of trained params; pruned entries stay pruned.
      pattern: ``(scores, sparsity) -> masks``; with ``jp.unstructured(jp.global_threshold)`` all
        layers are ranked together, as the papers do for deep networks.
      resume: the last round of an interrupted run, to go on after it.
      progress: None or True to show the round at work once it takes long, False for silence, or
        what wraps the rounds after the dense one, such as ``tqdm.tqdm``.

    Raises:
      TypeError: for arguments in another order.
      ValueError: unless 0 <= rewind_to < steps, rounds >= 1, rewind is known, the state of tx
        holds masks, and ``resume`` is of a run with the same step to rewind to.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp, optax
      >>> params = {"w": jnp.array([[1.0, -4.0, 3.0, 2.0]])}
      >>> tx = jp.training.static(optax.sgd(0.1), 0.0)
      >>> def train(params, state, start, stop):
      ...     for step in range(start, stop):
      ...         updates, state = tx.update(params, state, params)
      ...         params = optax.apply_updates(params, updates)
      ...     return params, state
      >>> for ticket in jp.training.iterative(train, tx, params, 0.75, rounds=2, steps=3):
      ...     print(ticket.masks["w"].astype(int))
      [[1 1 1 1]]
      [[0 1 1 0]]
      [[0 1 0 0]]

    References:
      Frankle and Carbin, `The Lottery Ticket Hypothesis <https://arxiv.org/abs/1803.03635>`__, 2019
      (reset); Frankle et al., `Linear Mode Connectivity <https://arxiv.org/abs/1912.05671>`__,
      2020, algorithm 2 (weights); Renda et al., [Rewinding and Fine-tuning](
      https://arxiv.org/abs/2003.02389), 2020 (learning rate). There momentum starts from 0 in a
      round; here the state of the optimizer is that of the step that is rewound to.
    """
    _check_order(train, tx)
    _check(rewind, rewind_to, rounds, steps)
    check_score(score)
    check(progress)
    schedule = exponential(0.0, sparsity, begin=0, end=rounds)
    begin = 0 if rewind == "reset" else rewind_to
    _check_resume(resume, begin, rounds)

    def dense_round() -> Round:
        masks = pattern(magnitude(params), 0.0)
        early = _copy(params), set_masks(tx.init(params), _copy(masks))
        if begin:
            early = train(early[0], early[1], 0, begin)
        after, state = train(_copy(early[0]), _copy(early[1]), begin, steps)
        return Round(jnp.int32(0), masks, after, state, early, jnp.int32(begin))

    def sparser_round(last: Round, index: int) -> Round:
        masks = _fewer(last, score, pattern, schedule(index))
        early_params, early_state = _copy(last.early)
        start = _copy(last.params) if rewind == "learning rate" else early_params
        state = set_masks(early_state, _copy(masks))
        after, state = train(apply_masks(start, masks), state, begin, steps)
        return Round(jnp.int32(index), masks, after, state, last.early, last.rewind_to)

    def tickets() -> Iterator[Round]:
        last = resume
        if last is None:
            with working(f"training round 0 of {rounds}", progress):
                last = dense_round()
            yield last
        left = range(int(last.index) + 1, rounds + 1)
        for index in progress(left) if callable(progress) else left:
            with working(f"training round {index} of {rounds}", progress):
                last = sparser_round(last, index)
            yield last

    return tickets()


def _fewer(last: Round, score: ScoreFn, pattern: PatternFn, sparsity: jax.Array) -> Masks:
    """Masks within the last ones."""
    return pattern(hold(scored(score, last.params, {}), last.masks), sparsity)


def _copy(tree: Any) -> Any:
    """A copy, so that training may donate its arguments."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, tree)


def _check_order(train: Any, tx: Any) -> None:
    given = (train, "train", callable(train)), (tx, "tx", hasattr(tx, "init"))
    for value, name, fits in given:
        if not fits:
            raise TypeError(
                f"{name} of iterative is a {type(value).__name__}; the order is jp.training."
                "iterative(train, tx, params, sparsity, rounds=, steps=), tx an optimizer such as "
                "jp.training.static(inner, 0.0)"
            )


def _check(rewind: str, rewind_to: int, rounds: int, steps: int) -> None:
    if rewind not in ("weights", "learning rate", "reset"):
        raise ValueError(f"rewind is {rewind!r}; wanted 'weights', 'learning rate' or 'reset'")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; wanted how often to prune, at least 1")
    if not 0 <= rewind_to < steps:
        raise ValueError(
            f"rewind_to is {rewind_to} of {steps} steps; wanted a step of training, from 0 to "
            f"{steps - 1}"
        )


def _check_resume(resume: Round | None, begin: int, rounds: int) -> None:
    if resume is None:
        return
    saved, index = int(resume.rewind_to), int(resume.index)
    if saved != begin:
        raise ValueError(
            f"resume holds the network at step {saved}, and rounds are to begin at step {begin}, "
            f"which was never saved; pass rewind_to={saved}, or start anew without resume"
        )
    if index > rounds:
        raise ValueError(
            f"resume is round {index} of {rounds}; pass the number of rounds, at least {index}, "
            "that the run began with"
        )
