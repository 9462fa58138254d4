"""Coffer, a self-hosted media storage server. The map of its rooms is in README.md."""
