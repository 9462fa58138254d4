"""What the fork server of tests/launching.py has imported before it forks: also what Litestar and uvicorn would only import at a start."""
# ruff: noqa: F401

import encodings.idna
import gc

import litestar._kwargs.kwargs_model
import litestar.middleware._internal.exceptions
import litestar.plugins.attrs
import litestar.plugins.pydantic
import uvicorn.lifespan.on
import uvicorn.loops.uvloop

import server.app
import server.cli
import server.worker
import tests.launching

gc.collect()
gc.freeze()  # otherwise each child's first collection writes to all of it, and so copies it
