"""The tus door: resumable uploads by the protocol of https://tus.io, version 1.0.0, with all of its extensions.

`protocol.py` reads headers, `door.py` answers requests. What an upload is and how it is kept is `server/intake/resumable.py`'s.
"""
