"""Train with Horovod so that the batch grows where others decay the learning rate."""

__version__ = "0.1.0"
