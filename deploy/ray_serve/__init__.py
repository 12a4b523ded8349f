"""N replicas of the same server behind Ray Serve (extra ``ray``); docs/deploy-ray.md.

Only ``router``, ``deployments``, ``app`` and ``__main__`` import Ray. What they are made of is plain Python:

- ``affinity``: which replica; ``routes``: what a request asks for, as far as a router must know
- ``relay``: one request's answer from whichever replica gives it, tried again elsewhere, or ended with an error event
- ``fleet``: the one who orders the changes to the set of adapters; ``fleet_state``: what is remembered of them on disk
- ``member``: a replica's side of that, with ``following`` for its registry; ``calls``: a request to the application in
  this process; ``local``: that application, and all below it
- ``front``: the ASGI application that clients see
"""
