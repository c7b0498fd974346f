"""What is searched: spaces for every method, the jobs that they are searched over, the command."""
