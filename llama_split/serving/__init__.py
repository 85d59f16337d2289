"""The OpenAI-compatible server: many requests at once, over HTTP, by transformers' continuous batching."""
