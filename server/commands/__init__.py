"""What the `coffer` command does, by subject. `server/cli.py` reads the command line and calls these."""
