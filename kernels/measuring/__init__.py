"""How far is a sparse call from exact attention, and how far would it be in another form?

`errors` has the formulas, `rows_*` what a plan gives a few sampled queries, `calls` what the ops do when asked.
"""
