"""Row kernels: one pair that serves every token objective.

``fold`` turns a tile of logits into per-row statistics, ``grad`` turns per-row
coefficients into the gradient of the logits.  ``contract`` defines what both mean,
``rows_torch``, ``rows_triton`` and ``rows_host`` implement it, ``dispatch`` chooses between them.
Importing this package compiles nothing and touches no device.
"""
