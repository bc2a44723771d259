"""Which counts are worth timing: alignment, and limits."""

import jax.numpy as jnp
import pytest

import jaxprune as jp
from benchmarks.models.transformers import ViT, Widths
from jaxprune.budget import candidates, clock, model
from jaxprune.structure.select import chosen_dims
from tests.unit.budget.networks import built, module


def test_heads_of_aligned_size_need_no_alignment():
    fn, params, x = module(ViT(10, Widths(64, 4, 64, 64), 1, 8), jnp.ones((1, 16, 16, 3)))
    structure = jp.infer_structure(fn, params, x)
    names = chosen_dims(structure, "*heads")
    built = model.build(fn, params, (x,), structure, names, 64, {})
    assert built.counts[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("cost", "best"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}, 1),
        ({1: 2.0, 2: 1.5, 4: 1.2, 8: 1.0, 16: 0.99}, 8),
        ({1: 1.02, 2: 1.0}, 1),
        ({1: 3.0, 2: 2.0, 4: 1.0}, 4),
    ],
)
def test_alignment_is_the_finest_that_costs_no_more(cost, best):
    assert candidates.coarsest_worth(cost) == best


@pytest.mark.parametrize("size", [16, 100, 512, 768])
@pytest.mark.parametrize("step", [1, 2, 4, 8])
def test_odd_multiples(size, step):
    found = candidates.largest_odd_multiple(step, size)
    assert size - 2 * step <= found < size and found % step == 0 and found % (2 * step)


def test_each_dimension_gets_the_step_of_its_own_products(monkeypatch):
    """A device that is slow unless the rows of what has 48 columns are multiples of 4.

    Where it doesn't matter, the step is the finest that leaves few enough candidates.
    """
    made = built("mlp")
    tiles = {64: 1, 48: 4}

    def timed(group, counts):
        slow = any(n % tiles[d.size] for d, n in counts.items())
        return lambda: float(group.work(counts)) * (1.5 if slow else 1)

    monkeypatch.setattr(clock, "time_group", timed)
    steps = candidates.fastest_steps(made.groups, made.axes, jp.budget.LatencyTable(False), False)
    assert dict(zip((d.size for d in made.axes), steps)) == {64: 2, 48: 4}


def test_wide_dimensions_get_coarser_steps():
    made = built("mlp")
    assert made.counts[0].tolist() == [*range(2, 65, 2)]
    assert made.counts[1].tolist() == [*range(2, 49, 2)]
