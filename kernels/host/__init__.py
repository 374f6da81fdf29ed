"""C++ row kernels for the CPU: ``rows.cpp``, loaded by ``burnish.kernels.rows_host``."""
