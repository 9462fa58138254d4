"""The vault: bytes on volumes. The only room that opens, links or unlinks stored files.

Its order is the promise (P1): write, sync the file, link it to its final name, sync the directory. Whoever calls it commits
the row only after that, and answers only after the commit. Deleting runs the other way round.
"""

from server.vault.incoming import IncomingFile
from server.vault.vault import Vault
from server.vault.volume import Volume

__all__ = ["IncomingFile", "Vault", "Volume"]
