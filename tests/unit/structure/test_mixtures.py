"""The structures of public mixtures: half of the experts go, equal to logits of minus infinity."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from benchmarks.models import mixtures
from benchmarks.models.mixtures import EXPERTS, GROUPS, HIDDEN, LAYERS, NETWORKS
from jaxprune.typing import named_leaves

MEMBERS = EXPERTS // GROUPS
FOUND = {  # label -> units, of what holds experts
    "Mixtral": {f"layers/{k}/mlp experts": EXPERTS for k in range(LAYERS)},
    "DeepSeek": {
        "layers/1/mlp groups of experts": GROUPS,
        "layers/1/mlp experts per group": MEMBERS,
    },
    "Qwen-MoE": {"layers/mlp experts": EXPERTS},
}


def half(seed):
    """Half of the experts of each group: any, where there are no groups."""
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [np.isin(np.arange(MEMBERS), rng.permutation(MEMBERS)[: MEMBERS // 2])
         for _ in range(GROUPS)]
    )  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_the_experts_go(name):
    fn, params, ids = NETWORKS[name]()
    structure = jp.infer_structure(fn, params, ids, semantics="kept")
    labels = {d.label: d.size for d in structure.dims.values() if "experts" in d.label.split()}
    assert labels == FOUND[name]
    found = jp.experts.find(fn, params, ids)
    keep = {layer: half(k) for k, layer in enumerate(found.layers)}
    assert found.check(params, keep, ids) < 1e-5
    small = found.compact(params, keep, ids)
    stacks = [x for path, x in named_leaves(small.params) if "experts" in path]
    assert all(EXPERTS // 2 in x.shape[:2] for x in stacks)
    assert small.fn(small.params, ids).shape == (*ids.shape, mixtures.VOCABULARY)
    wanted = jnp.asarray(fn(params, ids))
    assert not np.allclose(small.fn(small.params, ids), wanted, rtol=1e-2)  # they did matter


@pytest.mark.parametrize("name", ["Mixtral", "Qwen-MoE"])
def test_compact_equals_the_function_at_half_of_the_experts(name):
    fn, params, ids = NETWORKS[name]()
    found = jp.experts.find(fn, params, ids)
    keep = {layer: half(k) for k, layer in enumerate(found.layers)}
    small = found.compact(params, keep, ids)
    wanted = fn(found.remove(params, keep, ids), ids)
    np.testing.assert_allclose(small.fn(small.params, ids), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_expert_keeps_half_of_its_hidden_units(name):
    fn, params, ids = NETWORKS[name]()
    structure = jp.infer_structure(fn, params, ids, semantics="kept")
    dims = [d for d in structure.dims.values() if d.label.endswith("experts hidden")]
    keep, rng = {}, np.random.default_rng(3)
    for dim in dims:
        above = [n for n in structure.parents(dim.name) if "experts" in structure.dims[n].label]
        for parent in above[:1]:
            rows = [np.isin(np.arange(HIDDEN), rng.permutation(HIDDEN)[: HIDDEN // 2])
                    for _ in range(structure.dims[parent].size)]  # fmt: skip
            keep[dim.name] = {parent: np.stack(rows)}
    assert keep
    masks = structure.masks(keep)
    small = jp.compact(fn, params, masks, ids, semantics="kept")
    assert small.certificate.exact, str(small.certificate)
    masked = fn(jp.apply_masks(params, masks), ids)
    np.testing.assert_allclose(small.fn(small.params, ids), masked, rtol=1e-4, atol=1e-4)


def test_groups_are_not_removed_from_parameters_alone():
    fn, params, ids = NETWORKS["DeepSeek"]()
    found = jp.experts.find(fn, params, ids)
    (layer,) = found.layers
    with pytest.raises(ValueError, match=r"experts in groups, .* write found.compact\(params"):
        found.remove(params, {layer: half(0)}, ids)


def test_groups_lose_equally_many():
    fn, params, ids = NETWORKS["DeepSeek"]()
    found = jp.experts.find(fn, params, ids)
    (layer,) = found.layers
    keep = np.arange(EXPERTS) % MEMBERS < 3
    keep[0] = False
    with pytest.raises(ValueError, match="between 2 and 3 of 4 experts of a group; keep equally"):
        found.compact(params, {layer: keep}, ids)
