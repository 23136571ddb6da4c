"""What the numbers are, and exact arithmetic on them."""
