"""The process that owns the prompt: embedding, norms, and in ``fused`` mode attention and the KV cache."""
