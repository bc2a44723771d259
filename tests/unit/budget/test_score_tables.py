"""How much score counts of dimensions keep."""

import jax
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.budget import model
from jaxprune.budget.score_tables import score_total
from tests.unit.budget.networks import setting


@pytest.mark.slow
def test_one_dimension_keeps_its_score_exactly():
    fn, params, structure, scores, x = setting("mlp")
    names = ["mid/kernel:1"]
    built = model.build(fn, params, (x,), structure, names, 1, {})
    total, order, _ = score_total(structure, built, scores, "sum")
    for i, count in enumerate(built.counts[0]):
        keep = np.isin(np.arange(48), order[names[0]][:count])
        kept = jp.apply_masks(scores, structure.traced_masks({names[0]: keep}))
        wanted = sum(float(leaf.sum()) for leaf in jax.tree.leaves(kept))
        assert total.at(np.array([i])) == pytest.approx(wanted, rel=1e-5)
