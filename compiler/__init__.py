"""The compiler: trace, partition, lower, weights."""
