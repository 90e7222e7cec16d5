"""Which tokens lie together in one block? Cubes of the frame grid, or balanced splits along principal directions.

`cluster` makes the blocks of a call, `permute_*` moves keys and values into their order and takes the means.
"""
