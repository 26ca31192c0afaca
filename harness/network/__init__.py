"""Links that hurt: slow, lossy and broken connections to migrate over, in networks of their own.

A *wire* (`wire`) is two network namespaces with nothing between them but one shaped link. Sockets
are made inside and used outside: a socket belongs to the namespace in which it was created. The
namespaces have no name and no mount, only file descriptors of this process, so that none outlives
it, however it ends; the machine's own network is never touched.
"""
