"""C++ for the CPU, one library: ``rows.cpp`` and ``adamw.cpp``, built by ``burnish.kernels.host_build``."""
