"""How a run runs: command line, training loops, features, optimizers, checkpoints and logs. Knows no method by name."""
