"""What all rooms need: errors, request types, settings, spans."""
