"""What a GPU adds: pinned arenas beside torch's pinned memory, and arenas on the GPU."""
