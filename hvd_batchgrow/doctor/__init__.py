"""Checks of an installation and its machine, for `hvd-batchgrow doctor`. Nothing here imports torch or Horovod itself:
a separate process does, because the import may crash or hang."""
