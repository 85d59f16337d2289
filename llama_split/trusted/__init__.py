"""The process that owns the prompt; depending on the mode also embedding, norms, attention and KV cache."""
