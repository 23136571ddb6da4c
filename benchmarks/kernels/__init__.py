"""One layer's speed."""
