"""The pages that committed results are shown on: ``python -m benchmarks.pages`` writes them anew.

One page per study, ``docs/results/<study>.md``, made from its row in ``benchmarks.studies`` and its
JSON files; README's table, and the tables of ``docs/results/index.md`` and ``docs/reviewing.md``.
Each stands between two marks. What is outside them is written by hand, and stays.
"""
