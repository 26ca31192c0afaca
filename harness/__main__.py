"""`python -m harness` is `nsvm`."""

from harness.cli import main

main()
