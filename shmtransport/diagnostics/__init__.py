"""Facts about this machine, measurements of a running server, and the command line."""
