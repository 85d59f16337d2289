"""The process that owns the prompt: embedding, norms, and in ``op`` and ``fused`` mode attention and the KV cache."""
