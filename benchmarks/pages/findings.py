"""What each study shows: a claim, and the numbers of its committed file behind it.

``FINDINGS[study]`` is a claim and a function of the JSON that words the result. A study without a
row is listed with its question and files alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from benchmarks.studies.strangers.strangers import COMPARED

Found = dict[str, Any]


class Finding(NamedTuple):
    """What is claimed, without a number, and what words the numbers of a file."""

    claim: str
    result: Callable[[Found], str]


def _range(values: Iterable[float], unit: str = " x") -> str:
    known = list(values)
    each = [f"{v:.2f}" for v in (min(known), max(known))]
    return f"{each[0]}{unit}" if each[0] == each[1] else f"{each[0]} to {each[1]}{unit}"


def example(found: Found) -> str:
    (dense, small), (before, after) = found["params"], found["accuracy"]
    return (
        f"{dense:,} to {small:,} weights, {found['speedup']['median']:.2f} x, "
        f"accuracy {100 * before:.1f} to {100 * after:.1f} %"
    )


def main(found: Found) -> str:
    def at(pattern: str) -> list[float]:
        rows = [r for r in found["rows"] if r["pattern"] == pattern and r["sparsity"] == 0.5]
        return [r["timing"][-1]["speedup"]["median"] for r in rows]

    return (
        f"half of each dimension: {_range(at('structured'))}; "
        f"half of the single weights: {_range(at('unstructured'))}"
    )


def speed(found: Found) -> str:
    rows = [r for n in found["networks"].values() for r in n["rows"].items()]
    shares = [r["speedup"]["median"] / r["asked"] for name, r in rows if name.startswith("search")]
    masks = [r["speedup"]["median"] for name, r in rows if name == "masks at run time"]
    return (
        f"{len(shares)} speeds asked, {_range(shares)[:-2]} of each measured; "
        f"masks at run time: {_range(masks)}"
    )


def speed_accuracy(found: Found) -> str:
    rows = found["summary"]["residual, proportional"]["rows"]
    two = [f"{r['way']} {100 * r['accuracy']:.1f} %" for r in rows if r["asked"] == 2]
    return f"at 2 x: {', '.join(two)}"


def recovery(found: Found) -> str:
    rows = [r for r in found["summary"]["residual"] if (r["of"], r["asked"]) == ("speedup", 2)]
    kept = {
        r["repair"]: r["mean"] for r in rows if (r["score"], r["objective"]) == ("taylor", "sum")
    }
    return (
        f"residual network at 2 x: {kept['none']:.1f} points lost by the cut, "
        f"{kept['tuned']:.1f} after recovery"
    )


def strangers(found: Found) -> str:
    each = [
        f"{name} {row['mean']:.1f} of {row['allowed']:g}"
        for name, rows in found["summary"].items()
        for row in rows
        if row["asked"] == 2 and name not in COMPARED
    ]
    return f"2 x asked, points lost after recovery, of what may be: {', '.join(each)}"


def _fastest(network: Found, which: str) -> float:
    rows = network["rows"].items()
    return min(
        r["milliseconds"] for name, r in rows if name.startswith(which) and "milliseconds" in r
    )


def runtimes(found: Found) -> str:
    ratios = [_fastest(n, "dense") / _fastest(n, "pruned") for n in found["networks"].values()]
    worst = max(
        r.get("residual", 0) for n in found["networks"].values() for r in n["rows"].values()
    )
    return (
        f"{len(ratios)} networks: fastest over fastest {_range(ratios)}; "
        f"largest residual {worst:.0e}"
    )


def runtimes_search(found: Found) -> str:
    rows = [e["2"] for n in found["networks"].values() for e in n["own"].values()]
    return f"2 x asked, measured in the engine that was searched in: {_range(_medians(rows))}"


def _medians(rows: Iterable[Found]) -> list[float]:
    return [row["speedup"]["median"] for row in rows if "speedup" in row]


def int8(found: Found) -> str:
    def cost(network: Found) -> float:
        float32 = network["float32 in XLA"]["pruned"]
        rows = [r for r in network["rows"] if r["model"] == "pruned" and "accuracy" in r]
        base = {r["engine"]: r["accuracy"] for r in rows if r["int8"] is None}
        assert float32
        return max(base[r["engine"]] - r["accuracy"] for r in rows if r["int8"])

    lost = [f"{name} {100 * cost(n):.1f}" for name, n in found["networks"].items()]
    return f"points that int8 costs pruned networks, at most: {', '.join(lost)}"


def int8_pretrained(found: Found) -> str:
    def quality(row: Found) -> float:
        return 100 * float(row["agreement"] if "agreement" in row else row["accuracy"])

    def said(network: Found) -> str:
        rows = [r for r in network["rows"] if r["model"] == "pruned" and "milliseconds" in r]
        if "perplexity" in rows[0]:
            int8 = [r["perplexity"] for r in rows if r["int8"]]
            told = f"{min(int8):.1f} to {max(int8):.1f} in int8"
            return f"perplexity {rows[0]['perplexity']:.1f}, {told}"
        base = {r["engine"]: quality(r) for r in rows if r["int8"] is None}
        lost = [base[r["engine"]] - quality(r) for r in rows if r["int8"]]
        return f"{min(lost):.1f} to {max(lost):.1f} points"

    finished = {k: n for k, n in found["networks"].items() if "load_average" in n}
    each = [f"{name} {said(network)}" for name, network in finished.items()]
    return f"what int8 costs pruned networks, by kind: {', '.join(each)}"


def browser(found: Found) -> str:
    rows = found["rows"]
    speeds = [
        f"{name} {rows[name]['speedup over the first']:.2f} x, {100 * rows[name]['accuracy']:.1f} %"
        for name in ("pruned", "pruned + int8")
    ]
    return f"dense {100 * rows['dense']['accuracy']:.1f} %; {'; '.join(speeds)}"


def native(found: Found) -> str:
    ratios = [
        batch["forward"]["times"]["compact"]["ratio"]
        for network in found["networks"].values()
        for batch in network["batches"].values()
    ]
    return f"forward, {len(found['networks'])} networks: {_range(ratios)} the time of by hand"


def training(found: Found) -> str:
    kept = {name.partition(",")[0]: row["ratio"] for name, row in found["steps"].items()
            if name.endswith("masks kept")}  # fmt: skip
    return f"a step beside AdamW's, masks kept: {_range(kept.values())}"


def selection(found: Found) -> str:
    rows = found["updates"] | found["huge"]
    known = [row["jp.unstructured"] for row in rows.values() if "jp.unstructured" in row]
    ratios = [row["argsort_over_this"] for row in known]
    return f"{min(ratios):.0f} to {max(ratios):.0f} times faster than an argsort"


def solver_speed(found: Found) -> str:
    return f"{found['layers']} layers: {_range(found['seconds'].values(), ' s')} for each speed"


def structure_speed(found: Found) -> str:
    row = found["layers"]["48"]
    return (
        f"{row['equations']:,} equations: {row['seconds']['after_tracing']['median']:.2f} s "
        f"after {row['seconds']['tracing']['median']:.2f} s of tracing"
    )


def scale(found: Found) -> str:
    growth = [row["compact"] for row in found["growth"].values() if "compact" in row]
    leaves, row = max((int(label.split()[-1]), row) for label, row in found["beside adamw"].items())
    return (
        f"at twice the size compact takes {_range(growth)} as long; a step of jp.prune compiles in "
        f"{row['compile']:.1f} x adamw's time at {leaves:,} leaves; larger trees are not measured"
    )


def effects(found: Found) -> str:
    rows = found["effects"]
    return f"{sum(bool(r['appears']) for r in rows)} of {len(rows)} comparisons appear"


def experts(found: Found) -> str:
    def mean(name: str) -> float:
        return statistics.fmean(row["loss"][name] for row in found["rows"])

    names = {"dense": "dense", "REAP": "REAP", "frequency": "frequency", "magnitude": "magnitude"}
    return "held-out loss: " + ", ".join(f"{said} {mean(n):.2f}" for n, said in names.items())


def pretrained(found: Found) -> str:
    text, speech = (found["models"][name]["rows"] for name in ("MiniLM", "Silero VAD"))
    row = "FLAP + refit + bias -50%"
    return (
        f"MiniLM {100 * text['dense']['accuracy']:.1f} to {100 * text[row]['accuracy']:.1f} % at "
        f"{text[row]['timing']['batch 32']['speedup']['median']:.2f} x; Silero VAD agrees in "
        f"{100 * speech[row]['agreement']:.1f} % at "
        f"{speech[row]['timing']['4 s']['speedup']['median']:.2f} x"
    )


def whisper(found: Found) -> str:
    rows = found["summary"]
    gone = {
        "encoder FFN -30 %, FLAP": "30 % of the encoder's hidden units",
        "50 % of weights, SparseGPT": "half of the weights",
    }
    said = [f"{rows[name]['mean']:+.2f} without {what}" for name, what in gone.items()]
    if "search 1.3 x" in rows:
        said.append(f"{rows['search 1.3 x']['mean']:+.1f} searched for 1.3 x")
    dense = statistics.mean(rows["dense"]["wer"])
    return f"points of word error rate above {dense:.1f} %: {', '.join(said)}"


def self_supervision(found: Found) -> str:
    lost = {row["row"]: statistics.mean(row["points_lost"]) for row in found["summary"]}
    said = {
        "before": "cut before pretraining",
        "after, by magnitude": "after it by magnitude",
        "after, by the loss without labels": "by its own loss",
        "after, by the probe's loss": "by labels",
    }
    each = [f"{lost[f'{way}, 50% of FLOPs']:.1f} {text}" for way, text in said.items()]
    seeds = found["summary"][0]["seeds"]
    return f"half of the FLOPs gone, points a probe loses: {', '.join(each)}; seeds: {seeds}"


def oneshot(found: Found) -> str:
    rows = [r for r in found["rows"] if r["at"] == "50%" and r["calibration"] == "docs + glosses"]
    kept = {r["method"]: r["excerpt"] for r in rows if not r["drift"] and r["sequences"] == 64}
    names = [name for name in ("magnitude", "wanda", "sparsegpt", "alps") if name in kept]
    said = ", ".join(f"{name} {kept[name]:.1f}" for name in names)
    return f"perplexity at 50 %: dense {found['dense']['excerpt']:.1f}, {said}"


def stream(found: Found) -> str:
    said = [
        f"{name}: peak {row['stream']['peak_MB']:.0f} MB in place of "
        f"{row['sequential']['peak_MB']:.0f} MB, "
        f"{row['equal_tensors']} of {row['compared_tensors']} tensors bitwise equal"
        for name, row in found["rows"].items()
    ]
    return "; ".join(said)


def oneshot_layer(found: Found) -> str:
    rows = found["mean"]["2:4"]
    said = ", ".join(
        f"{name} {rows[name]['held out']:.3f}" for name in ("magnitude", "wanda", "alps")
    )
    return f"relative error at 2:4: {said}"


def oneshot_drift(found: Found) -> str:
    rows = found["rows"]
    shares = {name.rsplit(", ", 1)[1]: row["reference"] for name, row in rows.items()
              if name.startswith("50 %")}  # fmt: skip
    return "perplexity by share: " + ", ".join(f"{k}: {v:.1f}" for k, v in shares.items())


def oneshot_time(found: Found) -> str:
    ratio = found["sparsegpt_over_gram_and_factor"]
    return f"{ratio:.1f} x the Gram product and its factorisation, at {found['size']:,} columns"


def oneshot_structured(found: Found) -> str:
    row = found["rows"]["FLAP + stream -20 %"]
    share = row["params"] / 134_515_008
    return (
        f"perplexity {found['dense']['excerpt']:.1f} to {row['excerpt']:.1f} with "
        f"{100 * share:.0f} % of the parameters"
    )


def oneshot_search(found: Found) -> str:
    rows = {n: r["excerpt"] for n, r in found["rows"].items() if n.startswith("search")}
    each = [f"{n.removeprefix('search ').removesuffix(' + stream')}: {v:.1f}"
            for n, v in sorted(rows.items()) if n.endswith("stream")]  # fmt: skip
    return f"perplexity by planned speed: {', '.join(each)}"


def oneshot_structured_time(found: Found) -> str:
    runs = [row["prefill"] for row in found["rows"].values() if "predicted" in row["prefill"]]
    return (
        f"prefill {_range(_medians(runs))}; measured over predicted "
        f"{_range(r['speedup']['median'] / r['predicted'] for r in runs)[:-2]}"
    )


FINDINGS = {
    "example": Finding("README's example ends smaller, faster and as accurate", example),
    "main": Finding("Whole units make a network faster; single weights do not", main),
    "speed": Finding("A search reaches the speed that is asked for", speed),
    "speed_accuracy": Finding("At 2 x no way of choosing is ahead of the others", speed_accuracy),
    "recovery": Finding("A short recovery wins back most of what a cut costs", recovery),
    "strangers": Finding("README's recipe wins back most of a cut elsewhere, too", strangers),
    "runtimes": Finding("A pruned network is faster in each engine, and equal there", runtimes),
    "runtimes_search": Finding("Widths of one engine are not those of another", runtimes_search),
    "int8": Finding("Pruned networks bear int8 as dense ones do", int8),
    "int8_pretrained": Finding("Which int8 decides what it costs", int8_pretrained),
    "browser": Finding("A pruned network is faster in a browser, too", browser),
    "native": Finding("A compact program is as fast as one written small", native),
    "training": Finding("Masks cost next to nothing in a training step", training),
    "selection": Finding("Masks are chosen by counting, not by sorting", selection),
    "solver_speed": Finding("Choosing the widths takes seconds for deep networks", solver_speed),
    "structure_speed": Finding("Finding the structure is quicker than tracing", structure_speed),
    "scale": Finding("Cutting takes about twice as long at twice the size", scale),
    "effects": Finding("Known effects of pruning while training appear, not all", effects),
    "self_supervision": Finding("An encoder can be pruned without labels", self_supervision),
    "experts": Finding("REAP keeps the experts that a mixture needs", experts),
    "pretrained": Finding("Half of the units of text and speech models may go", pretrained),
    "whisper": Finding("Speech recognition bears some pruning without training", whisper),
    "oneshot": Finding("Reconstruction keeps more than scores alone", oneshot),
    "stream": Finding("A checkpoint is pruned from disk to disk, bit for bit", stream),
    "oneshot_layer": Finding("Better solvers keep more of a layer's output", oneshot_layer),
    "oneshot_drift": Finding("Making up for a part of the drift helps most", oneshot_drift),
    "oneshot_time": Finding("SparseGPT costs about twice its statistics", oneshot_time),
    "oneshot_structured": Finding("Units of a language model go at a price", oneshot_structured),
    "oneshot_search": Finding("A search in stages trades perplexity for speed", oneshot_search),
    "oneshot_structured_time": Finding(
        "Cut language models are as fast as single operations predict", oneshot_structured_time
    ),
}  # fmt: skip
