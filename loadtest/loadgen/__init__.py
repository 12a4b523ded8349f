"""The load generator. What is asked: profiles, arrivals, prompts, traces. How: session, users, streams, adapter_swaps.
What came of it: records, summary, thresholds, report. locust drives it; loadtest/README.md explains it to its users.
"""
