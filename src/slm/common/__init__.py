"""What both the server and the SDK need, below everything else."""
