"""Evaluation at small sizes, and its certificate."""
