"""The commands of `nsvm`, one module each; each names its click command `command`."""
