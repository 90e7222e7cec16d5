"""The mathematics of SVG-EAR attention: plain PyTorch and Triton. Nothing here knows about graphs."""
