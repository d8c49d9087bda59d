"""Checks of an installation and its machine, for `hvd-batchgrow doctor`. A separate process imports
torch and Horovod, because the import may crash or hang."""
