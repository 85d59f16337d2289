"""Round trips of our transport beside others', each in fresh pairs of processes, all in one run."""
