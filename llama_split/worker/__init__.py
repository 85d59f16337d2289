"""The process that owns the weight matrices."""
