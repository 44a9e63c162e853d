"""Train and log: the training loop, optimizers, checkpoints, logs, and features with k-NN.

No file here names a method.
"""
