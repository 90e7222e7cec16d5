"""Which blocks are computed exactly? Spends a budget of query-key pairs where the error is largest.

Cost of a pair of blocks: its area |Q_i| n_j. Scores are per unit of cost (kernels/probe/torch.py); the largest go
first, among equals the lowest index. Text rows and columns are exact and outside of every budget; so is a
block whose error is NaN, because nothing can be said about it.

"output_error": one budget for a batch element, over all its heads and rows: density times all video pairs.
Blocks are taken while they fit; the first that does not ends it, so the density is never exceeded. Errors are
compared in steps of 1/512 nat (0.1% of an error's norm): so many bits are found in a few passes.

"svg_ear" and "mass", the papers' routings: a budget for each row (kernels/papers/budgets.py).

Areas are summed as integers: exactly, and in any order with the same result.
"""
