"""What a program runs on: devices, processes that work together, memory; nothing here knows what is computed."""
