"""What the benchmarks share: problems with references, and methods to run on them."""
