"""The peers, one file each: how a user of that runtime would compute the same. Only workers import them."""
