"""Widths under a budget: what each costs, which to keep, and what was measured."""
