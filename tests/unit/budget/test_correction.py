"""What was measured, and how it corrects tables."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune.budget.correction import Measurements, rising


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_rising_numbers_are_the_closest(values):
    """Pool adjacent violators: no fall, means kept, and nothing changes where nothing falls."""
    found = rising(values)
    assert (np.diff(found) >= -1e-9).all()
    assert found.mean() == pytest.approx(np.mean(values), abs=1e-9)
    np.testing.assert_allclose(rising(sorted(values)), sorted(values))
    better = found + 0.01 * (np.sort(values) - found)  # another rising line, a step towards it
    assert ((found - values) ** 2).sum() <= ((better - values) ** 2).sum() + 1e-9


def test_the_line_goes_through_what_was_found():
    measured = Measurements({"flops": 8.0})
    assert measured.corrected("flops", 5.0, whole=10.0) == 4.0
    measured.add("flops", 5.0, found=6.0, certain=False)
    assert measured.corrected("flops", 5.0, whole=10.0) == 6.0
    assert measured.said("flops", 6.0, whole=10.0) == 5.0
    assert measured.said("flops", 7.0, whole=10.0) == 7.5


def test_only_what_a_long_run_found_is_kept():
    measured = Measurements({"flops": 8.0})
    measured.add("flops", 5.0, found=6.0, certain=False)
    measured.add("flops", 7.0, found=7.0, certain=True)
    measured.forget_uncertain()
    assert measured.points == {"flops": {7.0: (7.0, True)}}
    assert measured.corrected("flops", 3.5, whole=10.0) == 3.5


def test_a_budget_of_nothing_stays_above_zero():
    assert Measurements({"flops": 8.0}).said("flops", 0.0, whole=10.0) > 0
