"""The operators: every block maps (B, C, *spatial) to the same shape and is the identity at init."""
