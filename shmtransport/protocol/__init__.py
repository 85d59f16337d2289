"""What the bytes between two sides mean, without I/O."""
