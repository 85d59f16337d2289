"""The package's version; imports nothing, so that the build can read it."""

VERSION = "0.1.0"
