"""Train and log: the training loop, optimizers, checkpoints, logs, and features with k-NN.

Nothing here names a method.
"""
