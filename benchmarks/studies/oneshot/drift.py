"""``python -m benchmarks oneshot_drift``: how much of the drift pruned kernels should make up for.

Chosen on texts that nothing is fit to and no table reports: Python's language reference, and
WordNet's adjectives. Of single weights (``jp.oneshot.sequential(error_propagation=)``) and of
hidden units (:mod:`benchmarks.studies.oneshot.stream`). Rows that the result file has are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import studies
from benchmarks.common import results, texts
from benchmarks.models import smollm2
from benchmarks.studies.oneshot import stream as oneshot_stream
from benchmarks.studies.oneshot import structured
from benchmarks.studies.oneshot import weights as oneshot

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def unseen(tokenizer: Any) -> dict[str, np.ndarray]:
    """Out of the calibrated texts, and out of the reported ones."""
    return {
        "reference": texts.samples(tokenizer, texts.docs("reference"), 4, 512, seed=1),
        "adjectives": texts.sequences(tokenizer, texts.adjective_glosses(), 4, 512),
    }


Build = Callable[[Any, np.ndarray, float], Any]  # params, tokens, share -> pruned params


def weights(params: Any, tokens: np.ndarray, share: float) -> Any:
    return oneshot.prune_model(params, tokens, "wanda + refit", "50%", 0.01, share)[0]


def units(params: Any, tokens: np.ndarray, share: float) -> Any:
    keep, _ = structured.recipe("FLAP + stream -20 %", structured.scored(params, tokens))
    states = structured.states_of(params, tokens)
    structure, blocks = structured._structure(params), params["blocks"]
    pruned, _ = oneshot_stream.pruned_blocks(structure, blocks, states, keep, share)
    return params | {"blocks": pruned}


WAYS: dict[str, Build] = {"50 %, Wanda + refit": weights, "hidden units -20 %, FLAP": units}


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("oneshot_drift", __doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    args = parser.parse_args(argv)
    path = results.begun("oneshot_drift.json", args.results)
    result = results.load(path) if path.exists() else results.header("oneshot_drift")
    params, tokenizer = smollm2.load()
    texts_unseen = unseen(tokenizer)
    tokens = oneshot.calibration(tokenizer, True, 2 * oneshot.SEQUENCES)
    result.setdefault("dense", oneshot.measure(params, texts_unseen))
    rows = result.setdefault("rows", {})
    for way in args.ways:
        for share in SHARES:
            name = f"{way}, {share:g}"
            if name not in rows:
                pruned = WAYS[way](params, tokens, share)
                rows[name] = oneshot.measure(pruned, texts_unseen) | {"date": results.today()}
                results.save(result, path)
                print(name, rows[name], flush=True)
