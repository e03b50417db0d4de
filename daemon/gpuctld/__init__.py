"""gpuctld: the service. One process per GPU, one controller without a CUDA context."""
