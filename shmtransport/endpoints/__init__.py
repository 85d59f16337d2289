"""A connection from beginning to end: clients and servers, blocking and asyncio."""
