"""Previews: pictures of stored files. Nothing here decodes in its own process; `making` has it done in a jailed one."""
