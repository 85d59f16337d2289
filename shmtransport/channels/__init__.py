"""Channels carry encoded messages: over ZeroMQ, or over the doorbell's message rings."""
