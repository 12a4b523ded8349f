"""The simulation behind docs/scaling.md: many replicas, and more adapters than fit on one.

costs (what work takes, as measured), traffic (what is asked, when), tiers and replica (one server), routing (who is
asked), simulation (all of it), theory (what is known without simulating). bench/simulate_fleet.py is the command.
"""
