"""What a model needs and how fast it could be, from what the other rooms say of themselves."""
