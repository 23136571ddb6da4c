"""What choices of ranges are worth."""
