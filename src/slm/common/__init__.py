"""What the server and the SDK both need, below everything else."""
