"""Which blocks are computed exactly? Spends a budget of query-key pairs where the error is largest.

Cost of a pair of blocks: its area |Q_i| n_j. Scores are per unit of cost (kernels/probe/torch.py); the largest go
first, among equals the lowest index. Text rows and columns are exact and outside of every budget; so is a
block whose error is NaN, because nothing can be said about it.

"output_error": one budget for a batch element, over all its heads and rows: density times all video pairs.
Blocks are taken while they fit; the first that does not ends it, so the density is never exceeded.

"svg_ear" (arXiv 2603.08982): a budget per row, in keys. With a density every row has the same one, density
times the video keys of its head ("greedily selected under a fixed density budget", the paper's page);
without one, what centroid top-p 0.9 would keep (the released code). The 5% of key blocks with the largest
centroid mass go first and in any case, then the others by error until the budget is spent. So a row exceeds
its budget by less than its last block, or where the 5% alone are more.

"mass" (SVG2, arXiv 2505.18875): as "svg_ear" with the centroid mass for the error, so the 5% are nothing
special: without a density just the blocks of top-p 0.9.

Areas are summed as integers: exactly, and in any order with the same result.
"""
