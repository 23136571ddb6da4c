"""What is measured by hand: speeds, costs and qualities, in rooms named as the package's. Each runs as
`python -m benchmarks.ROOM.NAME` from the repository's root and says at its top what it does and how long it takes."""
