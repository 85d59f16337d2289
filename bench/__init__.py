"""Round trips of our transport beside others', each in a fresh pair of processes, all in one run."""
