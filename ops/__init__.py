"""What an operator, a timer or the Makefile runs. Calls the server's rooms; never re-implements them."""
