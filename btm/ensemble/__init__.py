"""Mix the next-token distributions of a forest's ELMs by the posterior over domains."""
