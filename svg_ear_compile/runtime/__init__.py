"""What the host does around each call of a compiled graph: who calls, at which step, how dense it runs."""
