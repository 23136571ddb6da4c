"""What modules cost and save."""
