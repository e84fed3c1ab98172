"""Language ranks: rows into buffers, the engine beside the event loop."""
