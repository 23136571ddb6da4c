"""Files for other engines."""
