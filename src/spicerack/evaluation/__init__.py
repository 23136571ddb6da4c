"""What quantizing lost and what it gained, measured on folders as they ship: perplexity, divergence, agreement, bytes,
speed."""
