"""Events out: who is told of them, and the telling, which the worker does."""

from server.webhooks.endpoints import EventType, register, rotate
from server.webhooks.sender import Sender

__all__ = ["EventType", "Sender", "register", "rotate"]
