"""While the job runs: what is logged, watched, and supplied. This room knows the recorded decision, not how it was made."""
