"""Operators: thin functions over the row kernels, registered with torch.library."""
