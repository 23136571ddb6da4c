"""Learning in few bits."""
