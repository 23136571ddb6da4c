"""What quantizing lost and what it gained, measured: perplexity, divergence, agreement, speed."""
