"""How a contender is measured: what it must do, what a call carries, its two processes, the rounds, the results."""
