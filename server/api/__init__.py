"""The HTTP door: the bare ASGI front with the byte routes, and Litestar for the JSON routes behind it."""
