"""Pure functions on tensors and arrays; each formula of the library stands here once."""
