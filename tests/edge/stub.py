"""nginx as `coffer edge install` sets it up, before a few words of nginx's own in the server's place."""

import shutil
from pathlib import Path

from server.commands.edge import TEMPLATES, Site, configuration, derived_key, lua_settings
from server.delivery.edge import write_state
from server.settings import Settings
from tests.edge.make_vectors import KEYS, VOLUME
from tests.edge.nginx import Nginx, free_port

FUTURE = 4_000_000_000.0


def stubbed_nginx(directory: Path, says: str) -> Nginx:
    """Not started yet. `says` is what stands in the location of the server; `directory / "volume"` is the volume."""
    volume, state, port = directory / "volume", directory / "state", free_port()
    nginx = Nginx(directory / "nginx", more=f"server {{ listen 127.0.0.1:{port}; location / {{ {says} }} }}")
    settings = Settings(link_keys=KEYS, edge_state_file=str(state), port=port, rate_links_per_address=None)
    site = Site(
        directory=nginx.directory,
        listen=f"127.0.0.1:{nginx.port}",
        metrics_listen=f"127.0.0.1:{nginx.metrics_port}",
        log_directory=nginx.directory,
    )
    own = nginx.directory / "coffer"
    own.mkdir()
    (own / "keys").write_text("".join(f"{derived_key(key)}\n" for key in KEYS))
    shutil.copy(TEMPLATES / "coffer_edge.lua", own)
    (own / "coffer_settings.lua").write_text(lua_settings(settings, {VOLUME.hex[:8]: str(volume)}))
    (nginx.directory / "conf.d" / "coffer.conf").write_text(configuration(settings, site, {str(VOLUME): str(volume)}))
    write_state(state, {"revoked": 5}, FUTURE)
    return nginx
