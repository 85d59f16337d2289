"""The arithmetic that both sides share."""
