"""How long finding the structure takes."""
