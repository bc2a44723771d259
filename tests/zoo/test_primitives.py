"""Every primitive that some model of the zoo meets has a row in the table of primitives."""

from jaxprune.ir.primitives import ROWS
from tests.models.zoo import ENTRIES
from tests.unit.ir.test_primitives import met


def test_every_primitive_that_the_whole_zoo_meets_has_a_row():
    found = set(met(ENTRIES))
    assert len(found) > 80
    assert found <= set(ROWS), "add a row to jaxprune/ir/primitives.py"
