"""What CUDA does for a connection: pins its arenas, and copies between them and a GPU without waiting."""
