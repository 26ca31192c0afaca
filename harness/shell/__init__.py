"""The inner end of `nsvm shell`: a Python prompt where the VM is. Standard library only."""
