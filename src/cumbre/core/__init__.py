"""What every room needs and nothing of ours comes before: errors, time, ids, instruments, configuration."""
