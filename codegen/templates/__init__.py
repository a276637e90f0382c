"""Kernel templates: Triton modules whose hooks are filled in for each region, and the C++ sources of the cpu target."""
