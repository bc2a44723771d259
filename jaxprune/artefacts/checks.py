"""What JSON that was read must look like, as tables."""

from __future__ import annotations

from typing import Any

Size = range(2**62)


def conform(value: Any, schema: Any, where: str) -> None:
    """Raises ValueError, with the place, unless a value read from JSON is as the schema says.

    A schema is a type, a range of integers, a set of allowed values, ``[schema of each]``,
    ``{str: schema of each}``, or ``{key: schema, ...}`` with exactly these keys.

    Example:
      >>> conform({"size": 3}, {"size": Size}, "plan")
      >>> conform({"size": -3}, {"size": Size}, "plan")
      Traceback (most recent call last):
      ValueError: plan['size'] is -3, wanted an integer from 0
    """
    if isinstance(schema, list):
        _check(isinstance(value, list), value, "a list", where)
        for i, item in enumerate(value):
            conform(item, schema[0], f"{where}[{i}]")
    elif isinstance(schema, dict):
        _check(isinstance(value, dict), value, "a mapping", where)
        if str not in schema:
            same = value.keys() == schema.keys()
            _check(same, sorted(value), f"the keys {sorted(schema)}", where)
        for key, item in value.items():
            conform(item, schema[str if str in schema else key], f"{where}[{key!r}]")
    elif isinstance(schema, range):
        fits = type(value) is int and value in schema
        _check(fits, value, f"an integer from {schema.start}", where)
    elif isinstance(schema, (set, frozenset)):
        fits = isinstance(value, str) and value in schema
        _check(fits, value, f"one of {sorted(schema)}", where)
    else:
        _check(type(value) is schema, value, schema.__name__, where)


def _check(fits: bool, value: Any, wanted: str, where: str) -> None:
    if not fits:
        raise ValueError(f"{where} is {value!r:.80}, wanted {wanted}")
