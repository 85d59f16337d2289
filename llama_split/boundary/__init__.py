"""The contract between the trusted side and the worker: operations, shapes, traffic."""
