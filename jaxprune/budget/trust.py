"""What a reader must know of a plan's times: what was not measured, scatters, or isn't decided."""

from __future__ import annotations

from collections.abc import Mapping

from jaxprune._load import BUSY, load
from jaxprune.budget.choosing import Try
from jaxprune.budget.roofline import Device
from jaxprune.budget.target import Target
from jaxprune.budget.times import Times

Notes = tuple[str, ...]

UNMEASURED = (
    "nothing was measured (verify=False): the prediction stands alone; search.verified(plan) "
    "measures it"
)


def estimated(device: Device | None) -> Notes:
    """That times are no measurements."""
    text = "time is an estimate from the published peaks of"
    return () if device is None else (f"{text} {device.name}",)


def missed(used: float) -> Notes:
    """That a target is missed, where it is."""
    return (f"the target is missed: {used:.3f} of the budget is used",) if used > 1 else ()


def undecided(target: Target, tried: Try, dense: Mapping[str, float]) -> Notes:
    """That the clock can't say whether a target is met, and whether the machine's load is why."""
    if tried.speedup is None or not target.timed:
        return ()
    asked = dense["latency"] / target.budgets(dense)["latency"]
    if not tried.speedup.undecided(asked):
        return ()
    busy = load() > BUSY
    why = "the machine is too busy to decide" if busy else "it is too close to decide"
    advice = "plan again when it is quieter" if busy else "a larger repeats= takes more rounds"
    return (
        f"{why}: half of the rounds gave a speed-up between {tried.speedup.low:.2f} and "
        f"{tried.speedup.high:.2f}, and {asked:.4g} is asked for (load: {load():.1f} processes per "
        f"core); {advice}",
    )


def doubtful(times: Times | None) -> Notes:
    """That some times of operations can't be trusted, with the worst one."""
    names = [] if times is None else times.table.doubtful(times.names)
    if times is None or not names:
        return ()
    entries = [times.table.entries[name] for name in names]
    busiest, widest = max(e.load for e in entries), max(e.spread for e in entries)
    return (
        f"{len(names)} of {len(times.names)} times of operations were taken on a busy machine "
        f"or scatter: load up to {busiest:.1f} processes per core, quartiles up to {widest:.0%} "
        f"apart, most of all {names[0]}; a search on a quieter machine takes them again",
    )


def interval(tried: Try, dense: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Between what time and speed-up are expected, where they are told from measured times."""
    if not tried.doubt or "latency" not in tried.predicted:
        return {}
    whole, seconds = dense["latency"], tried.predicted["latency"]
    low, high = seconds / (1 + tried.doubt), seconds * (1 + tried.doubt)
    return {"latency": (low, high), "speedup": (whole / high, whole / low)}
