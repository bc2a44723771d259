"""``python -m benchmarks.pages``: writes tables of committed results into README and docs/.

``--pictures`` draws those of the one-shot studies anew, too.
"""

from __future__ import annotations

import sys

from benchmarks.common import results
from benchmarks.pages import write
from benchmarks.studies.oneshot import report as oneshot_report
from benchmarks.studies.oneshot import structured_time


def pictures() -> None:
    """Draws anew what committed rows and times show."""
    for file in results.files("oneshot"):
        oneshot_report.plot(results.load(file), file.with_suffix(".png"))
    cut = results.load(*results.files("oneshot_structured"))
    for file in results.files("oneshot_structured_time"):
        structured_time.plot(cut, results.load(file)["rows"], file.with_suffix(".png"))


if __name__ == "__main__":
    for path, text in write.pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if "--pictures" in sys.argv:
        pictures()
