"""What planning promises, against what others measured."""
