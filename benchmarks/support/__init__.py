"""What benchmarks share; nothing here is a command."""
