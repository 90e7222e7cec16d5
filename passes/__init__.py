"""FX passes: find attention, decide, rewrite. They read and change graphs and never import Triton."""
