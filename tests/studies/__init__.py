"""The jobs of ``benchmarks``, on tiny settings."""
