"""From options to the processes of a job."""
