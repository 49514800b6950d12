"""The card's claims: what was measured, the metrics read from it, and the verdicts. No torch."""
