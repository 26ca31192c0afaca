"""Runs scenarios on a host from outside it: collects, calls, judges, records."""
