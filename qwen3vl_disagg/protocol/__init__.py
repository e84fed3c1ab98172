"""What is decided about items, pure: messages, the machines of both sides, router, blocks, layout."""
