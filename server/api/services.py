"""What the doors call. Made by the composition root, handed to every door."""

from dataclasses import dataclass, field

from server.api.limits import Limits
from server.api.streams import Streams
from server.auth import Authenticator
from server.delivery import Delivery, Links, RecentLinks
from server.delivery.provenance import Provenance
from server.generation import Generation
from server.generation.sheets import Sheets
from server.intake import Intake, Scanner
from server.ledger import Database, Notices, RememberedFigures
from server.metrics import Metrics
from server.settings import Settings
from server.vault import Vault


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """One of each per process, shared by all its requests. Whoever made them opens and closes them; a door only calls."""

    settings: Settings
    db: Database
    vault: Vault
    intake: Intake
    delivery: Delivery
    provenance: Provenance
    links: Links
    generation: Generation
    sheets: Sheets
    authenticator: Authenticator
    limits: Limits
    notices: Notices
    figures: RememberedFigures
    scanner: Scanner | None = None
    recent_links: RecentLinks = field(default_factory=RecentLinks)
    streams: Streams = field(default_factory=Streams)
    metrics: Metrics = field(default_factory=Metrics)
