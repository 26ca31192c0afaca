"""Many hosts at once: Ansible spreads the work over an inventory, results come into one store.

Nothing of a fleet runs on the hosts but what `nsvm run --host ssh:NAME` runs there: Ansible starts
one such run for each host on this machine (`playbook.yml`). So all that a host says is here as soon
as it is said, and stays when the host dies.
"""
