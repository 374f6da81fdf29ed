"""AXPO, Agent eXplorative Policy Optimization (arXiv 2605.28774): tool calls that a group got wrong are tried again.

``plan`` decides and credits, ``spans`` finds calls in tokens, ``batch`` joins rows, ``trainer`` is TRL's GRPOTrainer
with them, ``demo`` a toy that fits a CPU.  Nothing is imported before it is used.
"""
