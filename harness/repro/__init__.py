"""Known bugs by name: what shows each, on which kernels it was seen, and running that again.

`reproducers.toml` is the reviewed table, `evidence.json` what was seen (`nsvm repro run --record`
writes it), `table` and `evidence` read them; `colour` says from what was seen whether a bug showed
for its stated reason, `run` does it on a host.
"""
