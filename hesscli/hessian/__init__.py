"""The mathematics. Knows tensors, never files or terminals."""
