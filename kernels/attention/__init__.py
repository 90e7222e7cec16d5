"""Sparse attention with centroid compensation: kept blocks exactly, skipped ones by their centroids, in one softmax.

The formula is the plan's (kernels/plan.py), the reference kernels/reference.py. Three kernels compute it: `torch`
(CPUs), `triton` (any GPU) and `hopper` (Gluon, bf16 and fp16 on Hopper); `choice` says which runs.
`first_order` adds what a centroid leaves out, from the `covariance_*` of keys and values.
"""
