"""Numbers about networks and runs, for people and for programs."""
