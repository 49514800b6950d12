"""The command line: thin commands over the work that the other folders do."""
