"""Shared-memory segments, and the tensors in them."""
