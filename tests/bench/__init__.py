"""How fast the kit is, and how much memory it takes: against its peers, against this machine's best, and over time."""
