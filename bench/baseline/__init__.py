"""The baseline: the original system's forward of 98 calls, replayed over each way of carrying its tensors."""
