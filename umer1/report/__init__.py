"""`umer1 report`: training runs as one HTML page that needs nothing else."""
