"""What benchmarks share: runtimes taking turns in processes of their own, the machine's name and limits, tables."""
