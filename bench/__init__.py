"""Benchmarks: our transport beside others' and the machine's floors, in fresh pairs of processes, all in one run."""
