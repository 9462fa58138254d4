"""Generation: work that a pipeline elsewhere does for a user. Here it is registered, its outputs come in, and it is remembered."""

from server.generation.service import Callback, Generation, JobWish, OutputWish, Ticket

__all__ = ["Callback", "Generation", "JobWish", "OutputWish", "Ticket"]
