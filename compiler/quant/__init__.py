"""Low-bit number formats and how tensors are quantised to them."""
