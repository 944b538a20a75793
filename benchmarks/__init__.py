"""Speed and memory, one table a script; `python -m benchmarks` runs them all."""
