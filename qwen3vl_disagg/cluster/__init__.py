"""The ranks of a job as a whole: slots, meeting, the hub, who has joined, media on their way."""
