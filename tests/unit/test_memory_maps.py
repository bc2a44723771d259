"""The watch over memory maps that keeps one long process alive."""

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import memory_maps


@pytest.mark.slow
@pytest.mark.skipif(not memory_maps.limit(), reason="the system counts no memory maps")
def test_programs_are_dropped_beyond_the_share():
    programs = [jax.jit(lambda x, i=i: jnp.sin(x).sum() * i) for i in range(20)]
    for i, program in enumerate(programs):
        program(jnp.ones((i + 1, 7)))
    before = memory_maps.count()
    patient, strict = memory_maps.Watch(before * 2), memory_maps.Watch(before / 2)
    patient.look()
    assert (patient.peak, patient.drops) == (pytest.approx(before, rel=0.01), 0)
    strict.look()
    assert strict.drops == 1 and memory_maps.count() < before
    assert programs[3](jnp.ones((4, 7))) == pytest.approx(3 * 28 * float(jnp.sin(1.0)))
