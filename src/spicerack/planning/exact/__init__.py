"""An engine's own count of memory beside the plan's: the file that it is asked about, and what it answers."""
