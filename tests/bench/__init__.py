"""How fast the kit is: against its peers, against the machine's own products, and against itself."""
