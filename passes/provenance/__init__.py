"""Which tokens does each axis of each tensor of a graph hold? `rules.trace_axes` answers, as an `axes.Axes`."""
